"""Eva against an explicit solve with the Kronecker product of its averaged vectors."""

import pytest
import torch
from torch import nn

from mkor import Eva
from oracles.dense import EvaLayer
from support.cases import FEW, convolution
from support.following import backward, entry, error, follow, images, mlp, net, points

pytestmark = pytest.mark.usefixtures("device")

F64 = torch.float64


def wrapped(model, *, lr=0.01, **how):
    how = {"skip_output": False, "kl_clip": None} | how
    return Eva(model, torch.optim.SGD(model.parameters(), lr=lr), **how)


def run(model, batches, tolerance=1e-8, *, scale=1.0, **how):
    twin_how = {"scale": scale, "turned": scale == 1.0, "closed": scale != 1.0, "kind": EvaLayer}
    return follow(model, batches, lambda m: wrapped(m, **how), tolerance, **twin_how, **how)


@pytest.mark.slow
def test_two_hundred_updates():
    """Convolution, biases, a layer used twice: every gradient of 200 steps."""
    model = net()
    optimizer, twin = run(model, images(200), lr=1e-3)
    for name, (layer,) in twin.layers.items():
        for side in ("left", "right"):
            stored = entry(optimizer, model.get_submodule(name), f"{side}_vector")
            assert error(stored / (1 - 0.95**200), layer.average(side)) < 1e-8


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"damping": 1.0},
        {"damping": 1e-5, "lr": 1e-6},
        {"momentum": 0.3},
        {"update_every": 3},
        {"rescale": "step"},
        {"rescale": "running"},
    ],
    ids=str,
)
def test_options(how):
    run(mlp(), points(12), **how)


def test_accumulation():
    batches = points(4, (3, 5)) + points(3, (1, 1, 7)) + points(2, (2,))
    run(mlp(), batches)


@pytest.mark.parametrize("name", FEW)
def test_convolutions(name):
    """A convolution's mean patch, without unfolding the batch, is that of all patches."""
    layer, shapes = convolution(name)
    run(nn.Sequential(layer), [[shapes(3)], [shapes(1), shapes(2)]], damping=1e-3, lr=1e-6)


def test_without_bias():
    run(mlp(bias=False), points(20), damping=1e-3, lr=1e-5)


def test_old_average_has_the_weight():
    """``momentum`` weighs the old vector, as in the paper, not the new one."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=F64))
    optimizer = wrapped(model, lr=0.0, momentum=0.9)
    for value in (1.0, 2.0):
        optimizer.zero_grad()
        model(torch.full((4, 3), value, dtype=F64)).sum().backward()
        optimizer.step()
    expected = torch.full((3,), 0.9 * 0.1 * 1 + 0.1 * 2, dtype=F64)
    torch.testing.assert_close(entry(optimizer, model[0], "right_vector"), expected)


def test_along_and_across():
    """Across the vectors the step is ``M / delta``; along them ``M / (|a|^2 |b|^2 + delta)``."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=F64))
    optimizer = wrapped(model, lr=0.0, damping=0.25)
    x = torch.tensor([[1.0, 2.0, 2.0]], dtype=F64)  # |a|^2 = 9
    (model(x) @ torch.tensor([0.6, -0.8], dtype=F64)).sum().backward()  # |b|^2 = 1
    raw = model[0].weight.grad.clone()
    across = torch.tensor([[0.8, 0.6]], dtype=F64).T @ torch.tensor([[2.0, -1.0, 0.0]], dtype=F64)
    model[0].weight.grad += across
    optimizer.step()
    torch.testing.assert_close(model[0].weight.grad, raw / 9.25 + across / 0.25)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("damping", [1e-20, 0.03, 1e20])
def test_scale_of_gradients(scale, damping):
    """In float32 too, vectors of any length give the closed form."""
    batches = [[x.float() for x in micro] for micro in points(5)]
    run(mlp().float(), batches, 1e-4, scale=scale, lr=0.0, damping=damping)


def test_overflow_gives_the_raw_gradient():
    """Finite entries that ``1 / delta`` would carry out of float32 come back as they were."""
    model = mlp().float()
    optimizer = wrapped(model, lr=0.0, damping=1e-22)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, [torch.randn(8, 6)])
        optimizer.step()
    optimizer.zero_grad()
    backward(model, [torch.randn(8, 6)])
    model[0].weight.grad[2, 3] = 1e18
    raw = [p.grad.clone() for p in model[0].parameters()]
    optimizer.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(raw, model[0].parameters(), strict=True))
    assert optimizer.diagnostics()["mkor/raw_gradients"] == 1


BAD = [
    ({"momentum": 0.0}, ValueError, "momentum.*between 0 and 1.*0.0"),
    ({"damping": -0.1}, ValueError, "damping.*positive.*-0.1"),
    ({"damping": "0.1"}, TypeError, "damping.*number.*'0.1'"),
    ({"update_every": 0}, ValueError, "update_every.*at least 1.*0"),
    ({"sides": "left"}, (TypeError, ValueError), "sides"),
    ({"vectors": 2}, TypeError, "vectors"),
    ({"factor_dtype": torch.float16}, TypeError, "factor_dtype"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_arguments(options, kind, message):
    model = mlp()
    with pytest.raises(kind, match=message):
        wrapped(model, **options)
    assert not any(m._forward_hooks for m in model)
