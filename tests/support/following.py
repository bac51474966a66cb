"""Real training runs in float64 in which every step's gradients are compared with a twin's."""

from __future__ import annotations

import torch
from torch import nn

from support.contestants import Net
from support.recording import Twin, gradients

F64 = torch.float64


def net() -> nn.Module:
    """A convolution, a layer with and one without a bias that is used twice, and an output."""
    return Net(dtype=F64)


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9, bias=bias, dtype=F64),
        nn.Tanh(),
        nn.Linear(9, 7, bias=bias, dtype=F64),
        nn.Tanh(),
        nn.Linear(7, 3, bias=bias, dtype=F64),
    )


def images(steps: int, sizes=(5,)) -> list[list[torch.Tensor]]:
    """Micro-batches for ``net``, step by step."""
    return [[torch.randn(n, 1, 4, 4, dtype=F64) for n in sizes] for _ in range(steps)]


def points(steps: int, sizes=(8,)) -> list[list[torch.Tensor]]:
    """Micro-batches for ``mlp``, step by step."""
    return [[torch.randn(n, 6, dtype=F64) for n in sizes] for _ in range(steps)]


def backward(model: nn.Module, micro: list[torch.Tensor], scale: float = 1.0) -> None:
    """Targets of pure noise: gradients never fade. The loss is a mean over samples."""
    total = sum(len(x) for x in micro)
    for x in micro:
        out = model(x)
        (scale * (out - torch.randn_like(out)).square().sum() / total).backward()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def follow(
    model, batches, wrap, tolerance: float, *, scale=1.0, restart=None, turned=True, **twin_how
) -> tuple[object, Twin]:
    """Trains on ``batches`` and checks every gradient; ``wrap`` builds the optimizer.

    ``restart`` may set the twin's state before each step. At least one gradient must have been
    ``turned``, or the comparison would prove little.
    """
    optimizer = wrap(model)
    twin = Twin(model, **twin_how)
    smallest = 1.0
    for step, micro in enumerate(batches):
        optimizer.zero_grad()
        backward(model, micro, scale)
        raw = gradients(model)
        if restart is not None:
            restart(optimizer, twin)
        expected = twin.step(raw)
        optimizer.step()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, P in expected.items():
            assert P.isfinite().all()
            wrong = error(found[name], P)
            assert wrong < tolerance, f"step {step}, {name}: {wrong:.1e}"
            M = raw[name]
            smallest = min(smallest, ((P * M).sum() / (P.norm() * M.norm())).item())
    assert smallest < 0.99 or not turned
    return optimizer, twin


def entry(optimizer, module: nn.Module, key: str) -> torch.Tensor:
    """A factor of a layer, as it stands in ``optimizer.state``."""
    return optimizer.state[module.weight][f"mkor_{key}"]
