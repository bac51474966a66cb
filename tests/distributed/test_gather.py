"""``reduce="gather"`` on 2 and 3 processes, against vectors put together by hand in float64."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import mkor
from distributed.test_ddp import distributed
from distributed.test_fsdp import sharded
from oracles import window as oracles
from support.alike import assert_in_step
from support.launches import launches_of
from support.nets import ConvNet
from support.parallel import SHORT, Case, train
from support.recording import Recorder, gradients

LR = 0.05
SPARE = {
    "rank": 64,
    "vectors": 4,
    "rows": None,
    "momentum": 0.9,
    "damping": 0.05,
    "skip_output": False,
    "rescale": "step",
}
GATHER = SPARE | {"reduce": "gather"}

BY_HAND = {
    "one vector": Case(options=GATHER | {"vectors": 1}),
    "fewer vectors than processes": Case(options=GATHER | {"vectors": 2}),
    "several vectors each": Case(options=GATHER),
    "truncated": Case(options=GATHER | {"rank": 12}),
    "uneven": Case(options=GATHER, every="uneven"),
    "convolutions": Case(ConvNet, options=GATHER, every="uneven"),
    "rows that are all": Case(options=GATHER | {"rows": 5}),
    "accumulation": Case(options=GATHER, micro=2),
    "accumulation, always reduced": Case(options=GATHER, micro=2, eager_sync=True),
    "a process without rows": Case(options=GATHER, now_and_then="none"),
    "a lonely layer": Case(options=GATHER, every="lonely", setup={"touch": True}),
    "FSDP2": Case(options=GATHER, every="uneven"),
    "every other step": Case(options=GATHER | {"update_every": 2}),
    "rescaled by running averages": Case(options=GATHER | {"rescale": "running"}),
    "mean": Case(options=SPARE, every="uneven"),
    "late passes": Case(options=SPARE | {"vectors": 1}, micro_later=2, eager_sync=True),
    "mean, accumulation": Case(options=SPARE, micro=2, every="uneven"),
}
IN_STEP = {
    "few rows of many": Case(options=GATHER | {"rows": 2}),
    "dense": Case(
        wrap=mkor.DenseMKOR,
        options={"vectors": 3, "update_every": 1, "reduce": "gather", "skip_output": False},
        every="uneven",
    ),
}
SAME = {
    "mean of the same rows": (SPARE | {"vectors": 2, "rows": 6}, 1),
    "mean of the same rows, accumulation": (SPARE | {"vectors": 2, "rows": 6}, 2),
    "gathering the same rows": (GATHER | {"rows": 3}, 1),
    "gathering the same rows, accumulation": (GATHER | {"rows": 3}, 2),
}
"""Options, and micro-batches: every process has all rows."""
REFUSED = {
    "more vectors than the rank": Case(options=GATHER | {"rank": 5}),
}
CASES = {
    name: dataclasses.replace(case, base="plain")
    for name, case in (BY_HAND | IN_STEP | REFUSED).items()
} | {name: Case(options=options, micro=micro) for name, (options, micro) in SAME.items()}


def run(place, name):
    """A process' part of a case."""
    setup = sharded if name == "FSDP2" else distributed
    whole = (0, 1) if name in SAME else (place.rank, place.world)
    return train(CASES[name], setup, *whole)


_launches = launches_of(run)


# --------------------------------------------------------------------------------------- by hand


def statistics(case: Case, calls, world: int, bias: bool) -> oracles.Statistics:
    """Section 2.2, where every process has slots of its own, or all share the same.

    ``calls`` pairs the process' number with the calls of one of its micro-batches.
    """
    k, gathers = case.options["vectors"], "reduce" in case.options
    each = -(-k // world) if gathers else k
    slots = [([], []) for _ in range(each * world if gathers else k)]
    total = 0
    for rank, found in calls:
        for a, g in found:
            total += a.shape[0] * a.shape[1]
            parts = zip(a.tensor_split(each), g.tensor_split(each), strict=True)
            for j, (a_part, g_part) in enumerate(parts):
                slot = slots[j + each * rank * gathers]
                slot[0].append(a_part.flatten(0, 1))
                slot[1].append(g_part.flatten(0, 1))
    sides = [[torch.cat(slot[i]) for slot in slots if slot[i]] for i in (0, 1)]
    a, g = ([rows for rows in side if len(rows)] for side in sides)
    a, g = [oracles.with_ones(rows) if bias else rows for rows in a], [rows * total for rows in g]
    return oracles.Statistics(
        a=[rows.mean(0) for rows in a],
        g=[rows.mean(0) for rows in g],
        a_square=torch.cat(a).square().mean().item(),
        g_square=torch.cat(g).square().mean().item(),
    )


def recorded(case: Case, net, recorder: Recorder, step: int, world: int):
    """A step's gradients, and each layer's calls with the process that would make them."""
    x, y = case.data(step)
    calls = {name: [] for name in recorder.layers}
    net.zero_grad()
    for rank in range(world):
        for here, extra in case.pieces(step, rank, world):
            ((net(x[here], extra) - y[here]).square().sum() / y.numel()).backward()
            for name, groups in recorder.take().items():
                calls[name].append((rank, groups[0]))
    return gradients(net), calls


def put_off(calls, late):
    """What was captured after a process' first pass waits for the next update."""
    now, rest = {}, {}
    for name, found in calls.items():
        first = {rank: number for number, (rank, _) in reversed(list(enumerate(found)))}
        now[name] = late[name] + [found[number] for number in first.values()]
        rest[name] = [call for i, call in enumerate(found) if i not in first.values()]
    return now, rest


def by_hand(case: Case, world: int) -> torch.Tensor:
    """The weights after each step, from the oracles alone."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    net = case.net()
    recorder = Recorder(net)
    how = {key: case.options[key] for key in ("rank", "vectors", "momentum", "damping", "rescale")}
    twins = {
        name: oracles.TwinLayer(bias=layer.bias is not None, **how)
        for name, layer in recorder.layers.items()
    }
    history = [torch.cat([p.detach().flatten() for p in net.parameters()])]
    late = {name: [] for name in twins}
    for step in range(case.steps):
        raw, calls = recorded(case, net, recorder, step, world)
        if case.micro_later:
            calls, late = put_off(calls, late)
        for name, twin in twins.items():
            if step % case.options.get("update_every", 1) == 0:
                twin.history.append(statistics(case, calls[name], world, twin.bias))
            layer, P = recorder.layers[name], twin.precondition(raw[name][0])
            with torch.no_grad():
                layer.weight -= LR * P[:, : layer.weight[0].numel()].view_as(layer.weight)
                if twin.bias:
                    layer.bias -= LR * P[:, -1]
        history.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return torch.stack(history)


ON_TWO = {
    "one vector",
    "several vectors each",
    "uneven",
    "accumulation",
    "FSDP2",
    "mean",
    "late passes",
}
"""What two processes run, too; three run everything."""


@pytest.mark.parametrize(
    ("world", "name"),
    [(world, n) for n in BY_HAND for world in (2, 3) if world == 3 or n in ON_TWO],
)
def test_equals_vectors_put_together_by_hand(launches, world, name):
    """Each process adds whole vectors of its own rows, ``ceil(k / W)`` of them."""
    values = launches(world)[name]
    assert_in_step(values)
    expected = by_hand(CASES[name], world)
    torch.testing.assert_close(values[0]["weights"], expected, rtol=1e-9, atol=1e-9)
    assert values[0]["figures"]["mkor/mean_cosine"] < 0.995


@functools.cache
def of_all_rows(name):
    """The weights where no rows are left out."""
    options = SAME[name][0] | {"rows": None, "reduce": "mean"}
    return train(dataclasses.replace(CASES[name], options=options))["weights"]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", SAME)
def test_processes_with_the_same_rows(launches, world, name):
    """``m`` rows of a mean are ``m / W`` of each process; what is gathered has all of its own."""
    values = launches(world)[name]
    assert_in_step(values)
    options, case = SAME[name][0], CASES[name]
    share = {"rows": options["rows"] // world} if "mean" in name else {"vectors": -(-4 // world)}
    alone = train(dataclasses.replace(case, options=options | share | {"reduce": "mean"}))
    torch.testing.assert_close(values[0]["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
    assert (of_all_rows(name) - alone["weights"]).norm() > 1e-3


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", IN_STEP)
def test_processes_stay_in_step(launches, world, name):
    values = launches(world)[name]
    assert_in_step(values)
    assert values[0]["weights"].isfinite().all()
    assert values[0]["figures"]["mkor/updates"] == SHORT


@pytest.mark.parametrize("world", [3])
@pytest.mark.parametrize("name", REFUSED)
def test_more_vectors_than_the_rank_are_refused(launches, world, name):
    """Three processes with two vectors each are one too many for rank five."""
    failures = launches(world).failures(name)
    assert [failure.kind for failure in failures] == ["ValueError"] * world
    for failure in failures:
        assert "rank" in failure.message
        assert "3 processes" in failure.message


@pytest.mark.parametrize("wrap", [mkor.KFAC, mkor.Eva])
def test_one_mean_of_all_rows_is_not_gathered(wrap):
    net = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="gather"):
        wrap(net, base, reduce="gather")


@pytest.mark.parametrize("reduce", ["sum", None, 1])
def test_other_kinds_of_reduction_are_refused(reduce):
    net = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match=r"mean.*gather"):
        mkor.MKOR(net, base, reduce=reduce)


def test_one_process_gathers_what_it_means():
    """Without other processes there is no difference."""
    case = CASES["several vectors each"]
    gathered = train(case)
    meant = train(dataclasses.replace(case, options=SPARE))
    assert torch.equal(gathered["weights"], meant["weights"])
