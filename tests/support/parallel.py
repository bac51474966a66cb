"""Models, data and a training loop, for one process or for its part of several.

Gradients are always those of one loss: the sum over the step's rows, over their number. So it makes
no difference to them which process holds which rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mkor
from support.nets import Mlp

PREFIX = "mkor_"
LONG, SHORT = 20, 6
"""Steps of what must hold for long, and of its variants."""
F32, F64 = torch.float32, torch.float64
WHOLE = {"rank": 6, "vectors": 1, "rows": None, "skip_output": False, "momentum": 0.9}
"""One mean of all rows: the same, however they are shared out."""
EVERY = {"skip_output": False, "momentum": 0.9}
DENSE = {"skip_output": False, "momentum": 0.5, "update_every": 1}

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
    From the third step on there are ``micro_later`` of them. In step ``added`` the base gets the
    optional layer, between the backward pass and the step.
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
    micro_later: int | None = None
    added: int = -1
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
                micro = self.micro if step < 2 or self.micro_later is None else self.micro_later
                edges = torch.arange(start, stop).tensor_split(micro or rank + 1)
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


def base_of(case: Case, net: nn.Module) -> torch.optim.Optimizer:
    """Over all parameters but those that are added later."""
    later = () if case.added < 0 else tuple(net.extra.parameters())
    parameters = [p for p in net.parameters() if all(p is not other for other in later)]
    if case.base.startswith("adamw"):
        return torch.optim.AdamW(parameters, lr=0.005, eps=1e-3, fused="fused" in case.base)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9 if case.base == "sgd" else 0.0)


# -------------------------------------------------------------------------------------- training

Setup = Callable[[Case, nn.Module], tuple[nn.Module, Any]]
Sync = Callable[[nn.Module, bool], AbstractContextManager[None]]


def alone(case: Case, net: nn.Module) -> tuple[nn.Module, Any]:
    return net, case.wrap(net, base_of(case, net), **case.options)


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
            take_step(case, net, model, optimizer, step, rank, world)
            history.append(parts(net))
            if step == case.steps - 2:
                optimizer.diagnostics()  # from now on it measures the cosines
        if save is not None:
            save(model, optimizer)
        return {"weights": assembled(net, history), **described(optimizer)}
    finally:
        torch.set_default_dtype(F32)


def take_step(case: Case, net, model, optimizer: Any, step: int, rank: int, world: int) -> None:
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
    if case.added == step:
        optimizer.add_param_group({"params": list(net.extra.parameters())})
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
    mesh = first.device_mesh
    group = None if mesh.size() == dist.get_world_size() else mesh.get_group()
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, (here, mine), group=group)
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


ALONE: dict[str, dict[str, Any]] = {}


def reference(cases: dict[str, Case], name: str) -> dict[str, Any]:
    """One process on the whole batch, trained once for all ways to share the batch out."""
    case = cases[name]
    few = case.now_and_then == "few"
    plain = dataclasses.replace(
        case,
        every="lonely" if case.lonely else "even",
        now_and_then="few" if few else "",
        period=case.period if few else 1,
        micro=1,
        micro_later=None,
        closure=False,
        dropped=False,
        eager_sync=False,
        setup={},
    )
    if str(plain) not in ALONE:
        ALONE[str(plain)] = train(plain)
    return ALONE[str(plain)]
