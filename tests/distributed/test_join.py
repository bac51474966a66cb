"""Uneven numbers of batches under ``Join``: processes that are done do not hold up the others."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.alike import assert_in_step
from support.launches import launches_of
from support.nets import Mlp
from support.parallel import DENSE, EVERY, F64, WHOLE, assembled, described, parts

ROWS = 6
BATCHES = {1: (7,), 2: (7, 4), 3: (7, 2, 5)}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.5, patience=0.0, warmup=1, every=1)
CASES = {
    "MKOR": (mkor.MKOR, WHOLE),
    "every other step": (mkor.MKOR, WHOLE | {"update_every": 2}),
    "skipped": (mkor.MKOR, WHOLE | {"nonfinite": "skip"}),
    "KFAC": (mkor.KFAC, EVERY | {"damping": 0.1}),
    "Eva": (mkor.Eva, EVERY | {"damping": 3e-3}),
    "dense": (mkor.DenseMKOR, DENSE),
}
IN_STEP = {
    "hybrid": (mkor.MKOR, WHOLE | {"hybrid": SWITCH}),
    "gathered": (mkor.MKOR, WHOLE | {"vectors": 3, "reduce": "gather"}),
}
EVEN = {f"{name}, even": CASES[name] for name in ("MKOR", "KFAC")}
ALL = CASES | IN_STEP | EVEN


def batches(step, ranks):
    """The rows that these processes have in a step."""
    torch.manual_seed(step)
    x, y = torch.randn(3 * ROWS, 7, dtype=F64), torch.randn(3 * ROWS, 1, dtype=F64)
    rows = [slice(rank * ROWS, (rank + 1) * ROWS) for rank in ranks]
    return torch.cat([x[r] for r in rows]), torch.cat([y[r] for r in rows])


def lengths(name, world):
    return (5,) * world if name in EVEN else BATCHES[world]


def build(name):
    torch.manual_seed(0)
    net = Mlp().to(F64)
    base = torch.optim.SGD(net.parameters(), lr=0.05)
    return net, ALL[name][0](net, base, **ALL[name][1])


def run(place, name):
    """As many batches as the process has; the loss is scaled as DDP's average wants it."""
    net, optimizer = build(name)
    model = DistributedDataParallel(net)
    history = [parts(net)]
    with Join([model, optimizer]):
        for step in range(lengths(name, place.world)[place.rank]):
            active = sum(length > step for length in lengths(name, place.world))
            optimizer.zero_grad()
            x, y = batches(step, [place.rank])
            loss = mse_loss(model(x, True), y) * (place.world / active)
            loss.backward()
            if name == "hybrid":
                optimizer.report_loss(loss)
            optimizer.step()
            history.append(parts(net))
    return {
        "weights": assembled(net, [parts(net)]),
        "history": assembled(net, history),
        **described(optimizer),
    }


def alone(name, world):
    """One process with the rows of all that still have any."""
    net, optimizer = build(name)
    history = [parts(net)]
    for step in range(max(lengths(name, world))):
        ranks = [rank for rank, length in enumerate(lengths(name, world)) if length > step]
        optimizer.zero_grad()
        x, y = batches(step, ranks)
        mse_loss(net(x, True), y).backward()
        optimizer.step()
        history.append(parts(net))
    return assembled(net, history)


_launches = launches_of(run, collective=15.0)


ON_TWO = ["MKOR", "KFAC"]
"""What two processes run, too; three run everything."""


@pytest.mark.parametrize(
    ("world", "name"), [(2, name) for name in ON_TWO] + [(3, name) for name in CASES | EVEN]
)
def test_equals_one_process_with_the_rows_that_are_left(launches, world, name):
    """Whoever has no more batches counts as one with an empty batch, and ends with the others."""
    values = launches(world)[name]
    # The figures are of each process' own last step.
    assert_in_step(values, figures=name in EVEN)
    expected = alone(name, world)
    for value in values:
        found = value["history"]
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values[0]["weights"][0], expected[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", IN_STEP)
def test_ends_and_stays_in_step(launches, world, name):
    values = launches(world)[name]
    assert_in_step(values, figures=False)
    assert values[0]["weights"].isfinite().all()
