"""The control: lengths of MKOR, directions of the raw gradient."""

import copy

import pytest
import torch
from torch import nn

import mkor
from mkor.bench.contestants import parse_contestant
from mkor.bench.controls import Rescaling
from mkor.bench.optimizers import build

OPTIONS = "rank=8,vectors=2,rows=4,momentum=0.9,damping=0.05"


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


def gradients(text: str, steps: int) -> list[list[torch.Tensor]]:
    """What a contestant makes of the gradients of a model that never moves, step by step."""
    model = net()
    optimizer = build(parse_contestant(f"{text}+sgd" if text else "sgd"), model, 0.0, 0.0)
    made = []
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        (model(x) * (1.0 + step)).square().mean().backward()
        optimizer.step()
        made.append([weight.grad.clone() for weight in model.parameters()])
        optimizer.zero_grad()
    return made


def layers(all_gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    conv, bias, hidden, *_ = all_gradients
    return [torch.cat([conv.flatten(), bias]), hidden.flatten()]


@pytest.mark.parametrize(
    "more", ["", ",rescale=none", ",rescale=none,sides=left", ",update_every=3"]
)
def test_lengths_of_mkor_and_directions_of_the_raw_gradient(more: str) -> None:
    control = gradients(f"rescale[{OPTIONS}{more}]", 8)
    wrapped = gradients(f"mkor[{OPTIONS}{more}]", 8)
    raw = gradients("", 8)
    turned = 1.0
    for step in range(8):
        for mine, theirs, before in zip(
            layers(control[step]), layers(wrapped[step]), layers(raw[step]), strict=True
        ):
            assert mine.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4)
            assert torch.cosine_similarity(mine, before, 0) > 0.9999
            turned = min(turned, float(torch.cosine_similarity(theirs, before, 0)))
        for mine, before in zip(control[step][-2:], raw[step][-2:], strict=True):
            assert torch.equal(mine, before)
    assert turned < 0.99


def test_lengths_are_not_just_those_of_the_raw_gradient() -> None:
    control, raw = gradients(f"rescale[{OPTIONS}]", 8), gradients("", 8)
    ratio = layers(control[-1])[1].norm() / layers(raw[-1])[1].norm()
    assert not 0.99 < ratio < 1.01


def test_the_control_has_the_windows_of_mkor() -> None:
    optimizer = build(parse_contestant("rescale[rank=32]+adamw"), net(), 1e-3, 0.0)
    assert optimizer.curvature == Rescaling(mkor.Window(rank=32))
    default = build(parse_contestant("mkor+adamw"), net(), 1e-3, 0.0)
    control = build(parse_contestant("rescale+adamw"), net(), 1e-3, 0.0)
    assert control.curvature.window == default.curvature


def test_layers_that_do_not_come_through_stay_bitwise() -> None:
    control = Rescaling(mkor.Window(rank=2, vectors=1))
    W, b = torch.randn(3, 2, 4), torch.randn(3, 2)
    W[1] = 0.0
    b[1] = 0.0
    W[2, 0, 0] = torch.inf
    before = W.clone(), b.clone()
    prepared = {
        "left": torch.full((3, 2, 2), 0.3),
        "right": torch.full((3, 2, 4), 0.2),
        "bias": torch.full((3, 2), 0.1),
        "usable": torch.ones(3, dtype=torch.bool),
    }
    # A gradient without a finite norm is none of those that may come through.
    ok = control.apply(prepared, W, b, torch.tensor([False, True, False]))
    assert ok.tolist() == [False, True, False]
    assert torch.equal(W, before[0])
    assert torch.equal(b, before[1])


def test_a_control_can_be_copied() -> None:
    control = Rescaling(mkor.Window(rank=3, vectors=1))
    assert copy.deepcopy(control) == control
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = control.no_such_thing
