"""Writes checkpoints as the present version makes them, for ``test_old_checkpoints``.

A file stays as it is once a version has written it: a later version must be able to go on from
it. ``python tests/make_checkpoints.py`` was run with version 1 of the format, before any other,
and refuses to write over what is there.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, AdamW, Optimizer

import mkor

FILE = Path(__file__).resolve().parent / "fixtures" / "checkpoint-v1.pt"
STEPS, MORE = 5, 3
SEED = 20
F32, F64 = torch.float32, torch.float64


class Net(nn.Module):
    """A convolution, a layer used twice, attention with a matrix of its shape, and an output."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=dtype)
        self.first = nn.Linear(12, 6, dtype=dtype)
        self.again = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True, dtype=dtype)
        self.output = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x).tanh().transpose(1, 2).flatten(2)).tanh()
        x = self.again(self.again(x).tanh()).tanh()
        return self.output((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Between -1 and 1, with the same bits on every machine; normal numbers have others."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=generator, dtype=F64) - 1


def backward(model: nn.Module, step: int, seed: int) -> Tensor:
    """The loss of a step's batch, whose gradients are added."""
    x = numbers((10, 1, 4, 4), seed + step).to(next(model.parameters()).dtype)
    labels = torch.arange(10) % 3
    loss = functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


@dataclass(frozen=True)
class Case:
    """One optimizer, and how far from the stored weights another version may end."""

    wrap: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    base: Callable[..., Optimizer] = AdamW
    dtype: torch.dtype = F64
    tolerance: float = 1e-9

    def build(self) -> tuple[nn.Module, Any]:
        model = Net(self.dtype)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(numbers(tuple(p.shape), i) / (p[0].numel() ** 0.5 if p.dim() > 1 else 4))
        how = {"lr": 0.2, "momentum": 0.9} if self.base is SGD else {"lr": 0.02, "eps": 1e-6}
        base = self.base(model.parameters(), **how)
        return model, self.wrap(model, base, **self.options)


def train(model: nn.Module, optimizer: Any, steps: range, seed: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, seed)
        if optimizer.hybrid is not None:
            optimizer.report_loss(loss)
        optimizer.step()


WINDOW = {"rank": 7, "vectors": 2, "rows": 4, "momentum": 0.9, "damping": 0.05}
DENSE = {"vectors": 2, "momentum": 0.9, "update_every": 2, "rescale": "running"}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.4, patience=0.0, warmup=1, every=1)

CASES = {
    "mkor": Case(mkor.MKOR, WINDOW),
    "mkor, float16": Case(mkor.MKOR, WINDOW | {"factor_dtype": torch.float16}, tolerance=1e-4),
    "mkor, bfloat16": Case(mkor.MKOR, WINDOW | {"factor_dtype": torch.bfloat16}, tolerance=1e-3),
    "mkor, float32 weights": Case(
        mkor.MKOR, WINDOW | {"sides": "left", "update_every": 3}, SGD, F32, 1e-5
    ),
    "mkor, switched": Case(mkor.MKOR, WINDOW | {"hybrid": SWITCH}),
    "dense": Case(mkor.DenseMKOR, DENSE | {"rule": "exact"}, SGD),
    "dense, float16": Case(
        mkor.DenseMKOR,
        DENSE | {"rule": "release", "factor_dtype": torch.float16},
        SGD,
        tolerance=1e-4,
    ),
    "kfac": Case(mkor.KFAC, {"inverse_every": 3, "damping": 0.1, "kl_clip": 0.1}, SGD),
    "eva": Case(mkor.Eva, {"momentum": 0.8, "kl_clip": 0.1}, SGD),
}


def checkpoint(case: Case) -> dict[str, Any]:
    """What is kept of a case: all that was saved, and where three more steps then led."""
    model, optimizer = case.build()
    train(model, optimizer, range(STEPS), SEED)
    saved = {
        # Together, so that tensors that share their memory do so in the file, which is smaller.
        **copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}),
        "switched_at": optimizer.switched_at,
        "seed": SEED,
        "steps": STEPS,
    }
    train(model, optimizer, range(STEPS, STEPS + MORE), SEED)
    return saved | {"after": parameters_to_vector(model.parameters()).detach()}


def main() -> None:
    if FILE.exists():
        sys.exit(f"{FILE.name} is there already: a version writes its file once")
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    torch.save({name: checkpoint(case) for name, case in CASES.items()}, FILE)
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
