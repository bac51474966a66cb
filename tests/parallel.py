"""Models, data and a training loop, for one process or for its part of several.

Gradients are always those of one loss: the sum over the step's rows, over their number. So it makes
no difference to them which process holds which rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

import mkor

PREFIX = "mkor_"
NOTHING = "\0"
LONG, SHORT = 20, 8
"""Steps of what must hold for long, and of its variants."""
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-10}
WHOLE = {"rank": 6, "vectors": 1, "rows": None, "skip_output": False, "momentum": 0.9}
"""One mean of all rows: the same, however they are shared out."""
EVERY = {"skip_output": False, "momentum": 0.9}
DENSE = {"skip_output": False, "momentum": 0.5, "update_every": 1}

# ---------------------------------------------------------------------------------------- models


class Mlp(nn.Module):
    """Widths that nothing divides, a single output, a layer used twice and one now and then."""

    touch = False
    """Whether calls that do not use the optional layer show it no rows instead of skipping it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 17)
        self.again = nn.Linear(17, 17, bias=False)
        self.extra = nn.Linear(17, 17)
        self.narrow = nn.Linear(17, 5)
        self.output = nn.Linear(5, 1)

    def forward(self, x, extra):
        x = self.first(x).tanh()
        x = self.again(self.again(x).tanh()).tanh()
        if extra:
            x = x + self.extra(x).tanh()
        elif self.touch:
            x = x + self.extra(x[:0]).sum()
        return self.output(self.narrow(x).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 7), torch.randn(n, 1)


class ConvNet(nn.Module):
    """Convolutions with and without bias, padded and strided, and a layer on top."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 3, 2, stride=2, bias=False)
        self.output = nn.Linear(12, 2)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh().flatten(1))

    @staticmethod
    def rows(n):
        return torch.randn(n, 2, 4, 4), torch.randn(n, 2)


class Small(nn.Module):
    """Little to compile; widths that can be cut along both dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 6, bias=False)
        self.output = nn.Linear(6, 6)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 6)


class Tokens(nn.Module):
    """GPT-2's layers, whose weights are stored the other way round; a sample is three tokens."""

    def __init__(self):
        super().__init__()
        self.first = Conv1D(9, 7)
        self.second = Conv1D(5, 9)
        self.output = Conv1D(2, 5)
        for layer in (self.first, self.second, self.output):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 3, 7), torch.randn(n, 3, 2)


# ----------------------------------------------------------------------------------------- cases

SHARES = {
    "even": {1: (18,), 2: (9, 9), 3: (6, 6, 6)},
    "uneven": {1: (18,), 2: (13, 5), 3: (9, 7, 2)},
    "few": {1: (7,), 2: (4, 3), 3: (3, 3, 1)},
    "none": {1: (18,), 2: (18, 0), 3: (11, 7, 0)},
    "lonely": {1: (6, 12), 2: (6, 12), 3: (6, 5, 7)},
}
"""Rows of each process."""


@dataclass(frozen=True)
class Case:
    """A model, an optimizer, and how the rows come.

    ``every`` names the shares of all steps but those of the right remainder by ``period``, which
    ``now_and_then`` names. ``micro`` counts micro-batches; 0 gives each process another number.
    ``bad`` is a step whose last row, the last process', is multiplied with ``spoilt``.
    """

    net: type[nn.Module] = Mlp
    wrap: Callable[..., Any] = mkor.MKOR
    options: dict[str, Any] = field(default_factory=lambda: WHOLE)
    dtype: torch.dtype = F64
    steps: int = SHORT
    base: str = "sgd"
    every: str = "even"
    now_and_then: str = ""
    period: int = 3
    micro: int = 1
    bad: int = -1
    spoilt: float = float("nan")
    clip: bool = False
    closure: bool = False
    dropped: bool = False
    eager_sync: bool = False
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def lonely(self) -> bool:
        """Whether only the first process uses the optional layer."""
        return self.every == "lonely"

    def shares(self, step: int) -> dict[int, tuple[int, ...]]:
        """Rows of each process in a step, by the number of processes."""
        rare = step % self.period == self.period - 1
        return SHARES[(rare and self.now_and_then) or self.every]

    def pieces(self, step: int, rank: int, world: int) -> list[tuple[slice, bool]]:
        """A process' micro-batches: which rows, and whether they see the optional layer."""
        stops = torch.tensor(self.shares(step)[world]).cumsum(0).tolist()
        parts = list(zip([0, *stops], stops, strict=False))
        alone = world == 1
        found = []
        for i, (start, stop) in enumerate(parts):
            if alone or i == rank:
                flag = i == 0 or not self.lonely
                edges = torch.arange(start, stop).tensor_split(self.micro or rank + 1)
                at = start
                for edge in edges:
                    found.append((slice(at, at + len(edge)), flag))
                    at += len(edge)
        return found

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        """The step's rows, of all processes."""
        n = sum(self.shares(step)[1])
        torch.manual_seed(1000 + step)
        x, y = self.net.rows(n)
        if step == self.bad:
            x[-1] *= self.spoilt
        return x, y


def base_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.005, eps=1e-3)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9 if name == "sgd" else 0.0)


# -------------------------------------------------------------------------------------- training

Setup = Callable[[Case, nn.Module], tuple[nn.Module, Any]]
Sync = Callable[[nn.Module, bool], AbstractContextManager[None]]


def alone(case: Case, net: nn.Module) -> tuple[nn.Module, Any]:
    return net, case.wrap(net, base_of(case.base, net.parameters()), **case.options)


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """What DDP and FSDP2 have for accumulation."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def backward(case: Case, model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    """All of a step's backward passes; gradients are averaged over processes, so times ``world``.

    Returns the sum of the losses here.
    """
    x, y = case.data(step)
    todo = case.pieces(step, rank, world)
    total = torch.zeros(())
    for i, (here, extra) in enumerate(todo):
        with no_sync(model, case.eager_sync or i == len(todo) - 1):
            error = (model(x[here], extra) - y[here]).square().sum()
            loss = error * (world / y.numel())
            loss.backward()
        total = total + loss.detach()
    return total


def train(
    case: Case,
    setup: Setup = alone,
    rank: int = 0,
    world: int = 1,
    *,
    start: int = 0,
    load: Callable[[nn.Module, Any], None] | None = None,
    save: Callable[[nn.Module, Any], None] | None = None,
) -> dict[str, Any]:
    """Trains from a step on, and tells of all that must be equal somewhere."""
    torch.manual_seed(0)
    torch.set_default_dtype(case.dtype)
    try:
        net = case.net()
        model, optimizer = setup(case, net)
        if load is not None:
            load(model, optimizer)
        history = [parts(net)]
        for step in range(start, case.steps):
            take_step(case, model, optimizer, step, rank, world)
            history.append(parts(net))
            if step == case.steps - 2:
                optimizer.diagnostics()  # from now on it measures the cosines
        if save is not None:
            save(model, optimizer)
        return {"weights": assembled(net, history), **described(optimizer)}
    finally:
        torch.set_default_dtype(F32)


def take_step(case: Case, model: nn.Module, optimizer: Any, step: int, rank: int, world: int):
    optimizer.zero_grad()
    if case.dropped:
        backward(case, model, step + 1, rank, world)
        optimizer.zero_grad()
    if case.closure:
        optimizer.step(lambda: backward(case, model, step, rank, world))
        return
    loss = backward(case, model, step, rank, world)
    if case.options.get("hybrid") is not None:
        optimizer.report_loss(loss)
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def parts(net: nn.Module) -> list[Tensor]:
    """Copies of what is here of the weights."""
    return [
        (p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in net.parameters()
    ]


def assembled(net: nn.Module, history: list[list[Tensor]]) -> Tensor:
    """``[steps, numbers]``: the weights after each step, put together in one exchange.

    Where shards have replicas, of this process' own replicas only.
    """
    mine = [torch.stack(steps) for steps in zip(*history, strict=True)]
    first = next(net.parameters())
    if not isinstance(first, DTensor):
        return torch.cat([steps.flatten(1) for steps in mine], dim=1)
    here = tuple(first.device_mesh.get_coordinate())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (here, mine))
    theirs = [
        steps for place, steps in sorted(found, key=lambda f: f[0]) if place[:-1] == here[:-1]
    ]
    columns = []
    for i, p in enumerate(net.parameters()):
        dim = 1 + p.placements[-1].dim
        columns.append(torch.cat([steps[i] for steps in theirs], dim=dim).flatten(1))
    return torch.cat(columns, dim=1)


def whole(tensor: Tensor) -> Tensor:
    """A copy, put together from all shards."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def described(optimizer: Any) -> dict[str, Any]:
    """The wrapper's own entries, what is preconditioned, and the figures."""
    entries = optimizer.state_dict()["state"]
    return {
        "state": {
            f"{number} {key}": whole(value)
            for number, entry in entries.items()
            for key, value in sorted(entry.items())
            if key.startswith(PREFIX)
        },
        "covered": [row.parameter for row in optimizer.coverage() if row.preconditioned],
        "figures": optimizer.diagnostics(),
        "switched at": optimizer.switched_at,
    }


ALONE: dict[int, dict[str, Any]] = {}


def reference(cases: dict[str, Case], name: str) -> dict[str, Any]:
    """One process on the whole batch, trained once per case."""
    case = cases[name]
    if id(case) not in ALONE:
        ALONE[id(case)] = train(case)
    return ALONE[id(case)]


# ---------------------------------------------------------------------------------------- checks


def assert_equal(
    found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, *, own: str = NOTHING
) -> None:
    """Weights after every step, factors, figures and decisions are those of one process.

    But for entries with ``own`` in their names.
    """
    tolerance = TOLERANCE[dtype]
    assert_factors_equal(found, expected, dtype, own=own)
    assert found["covered"] == expected["covered"]
    assert found["figures"] == pytest.approx(expected["figures"], rel=100 * tolerance, nan_ok=True)


def assert_effective(expected: dict[str, Any], moved: float = 0.03) -> None:
    """Preconditioning did something, or the comparison would prove little."""
    turned = expected["figures"].get("mkor/mean_cosine", 0.0)
    assert turned < 0.995
    assert (expected["weights"][-1] - expected["weights"][0]).norm() > moved


def assert_factors_equal(
    found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, *, own: str = NOTHING
) -> None:
    """Weights after the last steps, factors and the switch are those of one process."""
    tolerance = TOLERANCE[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    last = expected["weights"][-len(found["weights"]) :]
    torch.testing.assert_close(found["weights"], last, **close)
    assert found["switched at"] == expected["switched at"]
    assert found["state"].keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        if own in key:
            continue
        if "counters" in key:
            assert torch.equal(found["state"][key][:-1], tensor[:-1])
        else:
            scale = tensor.double().abs().max().item() if tensor.numel() else 0.0
            close = {"rtol": 0.0, "atol": 100 * tolerance * scale}
            torch.testing.assert_close(found["state"][key], tensor, **close, msg=f"{key} differs")


def assert_in_step(
    values: list[dict[str, Any]], *, own: str = NOTHING, figures: bool = True
) -> None:
    """Weights, factors, figures and decisions are bitwise the same on all processes.

    But for entries with ``own`` in their names.
    """
    first = values[0]
    assert first["covered"] or first["switched at"]
    for other in values[1:]:
        assert torch.equal(first["weights"].nan_to_num(), other["weights"].nan_to_num())
        assert first["state"].keys() == other["state"].keys()
        for key, tensor in first["state"].items():
            # The last counter is the process' own number of micro-batches.
            mine, theirs = tensor, other["state"][key]
            if "counters" in key:
                mine, theirs = mine[:-1], theirs[:-1]
            assert own in key or torch.equal(mine, theirs), key
        assert first["covered"] == other["covered"]
        if figures:
            assert first["figures"] == pytest.approx(other["figures"], rel=0, abs=0, nan_ok=True)
        assert first["switched at"] == other["switched at"]
    for key, tensor in first["state"].items():
        assert tensor.isfinite().all(), key
