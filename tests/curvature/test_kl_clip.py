"""The clip of all preconditioned gradients together, with every kind of factor."""

import pytest
import torch
from torch import nn

from mkor import KFAC, MKOR, DenseMKOR, Eva, Preconditioned, Window
from oracles.dense import DenseLayer, EvaLayer, KFACLayer
from oracles.window import TwinLayer
from support.following import backward, error, follow, images, mlp, net, points
from support.recording import gradients

pytestmark = pytest.mark.usefixtures("device")

F64 = torch.float64
WINDOW = {"rank": 6, "vectors": 2, "damping": 0.05, "momentum": 0.9}
KINDS = {
    "window": (MKOR, TwinLayer, WINDOW, {"rows": None, "rescale": None}),
    "dense": (DenseMKOR, DenseLayer, {"rule": "release"}, {"rescale": None, "update_every": 1}),
    "kfac": (KFAC, KFACLayer, {"damping": 0.01}, {}),
    "eva": (Eva, EvaLayer, {"damping": 0.1}, {}),
}


def wrap(kind, model, *, kl_clip, lr, **how):
    wrapper, _, options, own = KINDS[kind]
    groups = [{"params": m.parameters(), "lr": lr[n]} for n, m in layers(model).items()]
    rest = [p for n, p in model.named_parameters() if n.rsplit(".", 1)[0] not in lr]
    base = torch.optim.SGD([*groups, {"params": rest}], lr=0.1)
    return wrapper(model, base, kl_clip=kl_clip, **({"skip_output": False} | options | own | how))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def run(kind, model, batches, kl_clip, rates, **how):
    _, layer, options, _ = KINDS[kind]
    lr = dict(zip(layers(model), rates, strict=True))
    twin_how = {"kind": layer, "kl_clip": kl_clip, "lr": lr, **options, **how}
    twin_how.pop("inverse_every", None)
    return follow(
        model, batches, lambda m: wrap(kind, m, kl_clip=kl_clip, lr=lr, **how), 1e-8, **twin_how
    )


@pytest.mark.parametrize("kl_clip", [1e-3, 1e3], ids=["clips", "does not"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, kl_clip):
    """Over all layers at once, each with the learning rate of its own group."""
    run(kind, mlp(), points(10), kl_clip, (0.05, 0.01, 0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_two_shapes_and_a_layer_used_twice(kind):
    run(kind, net(), images(10), 1e-3, (0.05, 0.1, 0.02, 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_between_updates(kind):
    """Every step is clipped, whether or not it updates the factors."""
    inverse = {"inverse_every": 3} if kind == "kfac" else {}
    run(kind, mlp(), points(9), 1e-3, (0.05, 0.05, 0.05), update_every=3, **inverse)


def step(kl_clip, **how):
    """The raw and the preconditioned gradients of one step, as matrices."""
    torch.manual_seed(9)
    model = mlp()
    lr = dict.fromkeys(layers(model), 0.1)
    optimizer = wrap("kfac", model, kl_clip=kl_clip, lr=lr, **how)
    (micro,) = points(1)
    backward(model, micro)
    raw = gradients(model)
    optimizer.step()
    return raw, gradients(model)


def divergence(raw, new, names):
    return sum(0.1**2 * (raw[n] * new[n]).sum().item() for n in names)


def test_clipped_step_has_the_divergence_asked_for():
    """All gradients keep their directions and proportions; ``lr^2 <P, M>`` shrinks to the limit."""
    raw, free = step(None)
    _, clipped = step(1e-4)
    nu = (1e-4 / divergence(raw, free, raw)) ** 0.5
    assert nu < 1
    for name, P in clipped.items():
        assert error(P, nu * free[name]) < 1e-10


def test_layers_left_to_the_base_do_not_count():
    """Their gradients are neither in the sum nor shortened."""
    raw, free = step(None, skip=["2"])
    _, clipped = step(1e-4, skip=["2"])
    nu = (1e-4 / divergence(raw, free, ["0", "4"])) ** 0.5
    assert torch.equal(clipped["2"], raw["2"])
    for name in ("0", "4"):
        assert error(clipped[name], nu * free[name]) < 1e-10


def test_zero_gradients_are_left_alone():
    """``kl_clip / 0``: nothing to clip, nothing becomes NaN."""
    model = mlp()
    optimizer = wrap("kfac", model, kl_clip=1e-3, lr=dict.fromkeys(layers(model), 0.1))
    (0 * model(points(1)[0][0]).sum()).backward()
    optimizer.step()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_learning_rate_zero_clips_nothing():
    _, free = step(None)
    torch.manual_seed(9)
    model = mlp()
    optimizer = wrap("kfac", model, kl_clip=1e-9, lr=dict.fromkeys(layers(model), 0.0))
    backward(model, points(1)[0])
    optimizer.step()
    for name, P in gradients(model).items():
        assert error(P, free[name]) < 1e-12


def test_schedule_is_followed():
    """The rate of this step, as a scheduler left it in the group."""
    for factor in (1.0, 10.0):
        torch.manual_seed(9)
        model = mlp()
        optimizer = wrap("kfac", model, kl_clip=1e-4, lr=dict.fromkeys(layers(model), 0.1))
        for group in optimizer.param_groups:
            group["lr"] *= factor
        backward(model, points(1)[0])
        optimizer.step()
        found = gradients(model)
        if factor == 1.0:
            expected = found
    for name, P in found.items():
        assert error(P, expected[name] / 10) < 1e-10


def test_learning_rate_may_be_a_tensor():
    _, expected = step(1e-4)
    torch.manual_seed(9)
    model = mlp()
    rates = dict.fromkeys(layers(model), torch.tensor(0.1, dtype=F64))
    optimizer = wrap("kfac", model, kl_clip=1e-4, lr=rates)
    backward(model, points(1)[0])
    optimizer.step()
    for name, P in gradients(model).items():
        assert error(P, expected[name]) < 1e-6


def test_one_layer_of_non_finite_gradients():
    """A layer that falls back on its raw gradient does not poison the scale of the others."""
    model = mlp()
    optimizer = wrap("kfac", model, kl_clip=1e-3, lr=dict.fromkeys(layers(model), 0.1))
    for micro in points(2):
        optimizer.zero_grad()
        backward(model, micro)
        optimizer.step()
    optimizer.zero_grad()
    backward(model, points(1)[0])
    model[2].weight.grad[1, 2] = float("inf")
    raw = gradients(model)
    optimizer.step()
    new = gradients(model)
    assert torch.equal(new["2"], raw["2"])
    for name in ("0", "4"):
        assert new[name].isfinite().all()
        assert new[name].norm() > 0


def base(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [KFAC, Eva, MKOR, DenseMKOR])
@pytest.mark.parametrize("rescale", ["step", "running"])
def test_rescaling_and_clipping_exclude_each_other(kind, rescale):
    model = mlp()
    with pytest.raises(ValueError, match=r"rescale.*kl_clip|kl_clip.*rescale"):
        kind(model, base(model), rescale=rescale, kl_clip=0.001)
    with pytest.raises(ValueError, match=r"rescale.*kl_clip|kl_clip.*rescale"):
        Preconditioned(model, base(model), Window(), rescale=rescale, kl_clip=0.001)
    assert not any(m._forward_hooks for m in model)


BAD = [
    (0.0, ValueError, "kl_clip.*positive.*0.0"),
    (-1.0, ValueError, "kl_clip.*positive.*-1.0"),
    (float("nan"), ValueError, "kl_clip.*positive.*nan"),
    (float("inf"), ValueError, "kl_clip.*finite.*inf"),
    ("0.001", TypeError, "kl_clip.*number.*'0.001'"),
    (True, TypeError, "kl_clip.*number.*True"),
]


@pytest.mark.parametrize(("value", "kind", "message"), BAD, ids=str)
def test_bad_values(value, kind, message):
    for wrapper in (KFAC, Eva):
        model = mlp()
        with pytest.raises(kind, match=message):
            wrapper(model, base(model), kl_clip=value)
        assert not any(m._forward_hooks for m in model)
