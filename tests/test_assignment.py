"""KAISA's distribution: who does what, and that everybody gets what he needs and no more."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist

from mkor.communication import assignment
from mkor.communication.assignment import Assignment, Grid, assign, grid
from mkor.communication.communicator import Communicator
from processes import launch

F32, F64 = torch.float32, torch.float64

# ------------------------------------------------------------------------------------- who does


@pytest.mark.parametrize(
    ("world", "fraction", "height"),
    [
        (1, 1.0, 1),
        (1, 0.01, 1),
        (2, 1, 2),
        (2, 0.5, 1),
        (2, 1e-9, 1),
        (3, 1.0, 3),
        (3, 1 / 3, 1),
        (3, 0.333, 1),
        (4, 0.25, 1),
        (4, 0.5, 2),
        (4, 0.1, 1),
        (6, 1 / 3, 2),
        (6, 0.5, 3),
        (6, 0.3333, 2),
        (49, 1 / 49, 1),
        (64, 0.125, 8),
    ],
)
def test_grid(world, fraction, height):
    assert grid(world, fraction) == Grid(height, world // height)


@pytest.mark.parametrize(
    ("world", "fraction", "fitting"),
    [
        (2, 0.75, "1/2, 1"),
        (3, 0.5, "1/3, 1"),
        (3, 2 / 3, "1/3, 1"),
        (4, 0.75, "1/4, 1/2, 1"),
        (4, 0.4, "1/4, 1/2, 1"),
        (6, 0.3, "1/6, 1/3, 1/2, 1"),
        (6, 5 / 6, "1/6, 1/3, 1/2, 1"),
    ],
)
def test_fractions_that_do_not_fit(world, fraction, fitting):
    """The error says which would."""
    message = f"grad_worker_fraction={fraction} .* of {world} processes .*: {fitting} would"
    with pytest.raises(ValueError, match=message):
        grid(world, fraction)


def shapes(world):
    return [Grid(n, world // n) for n in range(1, world + 1) if world % n == 0]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_rows_and_columns(world):
    """Columns and rows each hold every process once, and a row and a column meet in one."""
    for one in shapes(world):
        ranks = range(world)
        columns, rows = ({tuple(f(r)) for r in ranks} for f in (one.column, one.row))
        assert all(rank in one.column(rank) and rank in one.row(rank) for rank in ranks)
        assert sorted(itertools.chain(*columns)) == sorted(itertools.chain(*rows)) == list(ranks)
        assert {len(column) for column in columns} == {one.height}
        assert {len(row) for row in rows} == {one.width}
        assert all(row == tuple(range(row[0], row[0] + one.width)) for row in rows)
        for row, column in itertools.product(rows, columns):
            assert len(set(row) & set(column)) == 1
            # What a column has is found at the same place of every row.
            assert row[column[0] % one.width] in column


def heaviest(costs, ranks, world):
    loads = [0] * world
    for cost, rank in zip(costs, ranks, strict=True):
        loads[rank] += cost
    return max(loads)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_balance(world):
    """Not worse than Graham's bound ``4/3 - 1/(3 W)`` times the best of all assignments."""
    rng = random.Random(world)
    for _ in range(20):
        costs = [rng.choice((1, 2, 5, 7, 11, 13)) ** 3 for _ in range(rng.randint(1, 6))]
        # The first piece can be anyone's.
        every = itertools.product(range(world), repeat=len(costs) - 1)
        best = min(heaviest(costs, (0, *rest), world) for rest in every)
        found = heaviest(costs, assign(costs, world), world)
        assert found <= best * (4 / 3 - 1 / (3 * world)) * (1 + 1e-12)


def test_balance_of_a_transformer():
    """Twelve blocks on six processes: within the bound of the even share."""
    costs = 12 * [2 * 768**3] * 4 + 12 * [768**3 + 3072**3] * 2
    found = heaviest(costs, assign(costs, 6), 6)
    assert found <= 1.01 * sum(costs) / 6


def test_assign_the_longest_first():
    assert assign([1, 8, 5, 4, 5], 2) == [1, 0, 1, 0, 1]
    assert assign([3, 3, 3, 3], 3) == [0, 1, 2, 0]
    assert assign([], 4) == []
    assert assign([7.5, 1.0], 1) == [0, 0]


def test_assign_is_deterministic():
    costs = [random.Random(5).randint(1, 4) for _ in range(50)]
    assert assign(costs, 6) == assign(list(costs), 6)


# ---------------------------------------------------------------------------------- what is sent


class Counter:
    """Counts the collectives of a process, and the numbers in each."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("broadcast", "all_reduce"):
            monkeypatch.setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name, collective):
        def call(tensor, *args, **how):
            assert how["async_op"]
            self.calls.append((name, tensor.numel()))
            return collective(tensor, *args, **how)

        return call

    def take(self):
        taken, self.calls = self.calls, []
        return taken


def layers(rank, world):
    """Two layers of each inverter, of three dtypes and sizes; every number tells who made it."""
    parts = []
    for inverter in (*range(world), *reversed(range(world))):
        made = 100.0 * (rank + 1) + inverter
        wide = torch.full((2, 3, 5), made, dtype=F64)
        # As gradients that are stored the other way round.
        turned = torch.full((4, 2), made + 0.5, dtype=F32).mT
        long = torch.full((40, 2), made + 0.75, dtype=F32).mT
        flags = torch.tensor([rank == inverter, rank % 2 == 0, True])
        big = torch.full((2, 40), made + 0.25, dtype=F32)
        parts += [(inverter, [wide, flags]), (inverter, [turned, big, long])]
    return parts


def check(parts, source, what):
    """That every tensor of a part is that of the process ``source(inverter)``."""
    expected = {rank: layers(rank, what["world"]) for rank in range(what["world"])}
    for place, (inverter, tensors) in enumerate(parts):
        theirs = expected[source(inverter)][place][1]
        for found, wanted in zip(tensors, theirs, strict=True):
            assert torch.equal(found, wanted), (what, place, inverter)


def exchange(place, fraction):
    """Every kind of sharing on one process, twice, and what was sent for it."""
    assignment.LARGE = 80  # the last two of each inverter's float32 ones
    sent = {}
    with pytest.MonkeyPatch.context() as patch, place.group(str(fraction)):
        rank, world = place.rank, place.world
        communicator = Communicator()
        work, shape = Assignment(communicator, fraction), grid(world, fraction)
        counter = Counter(patch)
        what = {"rank": rank, "world": world, "fraction": fraction}
        for _ in range(2):
            parts = layers(rank, world)
            work.share_inverses(parts)
            check(parts, lambda i: i if work.preconditions(i) else rank, what)
            sent["inverses"] = counter.take()
            parts = layers(rank, world)
            work.share_gradients(parts)
            row = shape.row(rank)
            check(parts, lambda i, row=row: next(r for r in row if r in shape.column(i)), what)
            sent["gradients"] = counter.take()
            parts = layers(rank, world)
            work.share_notes(parts)
            check(parts, lambda i: i, what)
            sent["notes"] = counter.take()
        mine = [i for i in range(world) if work.preconditions(i)]
        assert mine == list(shape.column(rank))
        assert [i for i in range(world) if work.inverts(i)] == [rank]
        assert work.shares_gradients == (shape.width > 1)
        groups = len(dist.distributed_c10d._world.pg_map)
    return {**sent, "groups": groups}


GRIDS = [(1, 1.0), (2, 0.5), (2, 1.0), (3, 1 / 3), (3, 1.0), (4, 0.5)]


@pytest.mark.parametrize(("world", "fraction"), GRIDS)
def test_exchange(world, fraction, tmp_path):
    """Everyone ends with the right process's tensors, in as few messages as promised."""
    shape = grid(world, fraction)
    for sent in launch(exchange, world, tmp_path, fraction, timeout=60.0, collective=20.0):
        # One buffer of either dtype from each sender, and what is large by itself.
        small, large = (16, 66), 4 * world * [80]
        column = large[: 4 * shape.height] + shape.height * list(small)
        row = large + shape.width * [shape.height * n for n in small]
        assert sizes(sent["inverses"]) == (sorted(column) if shape.height > 1 else [])
        assert sizes(sent["gradients"]) == (sorted(row) if shape.width > 1 else [])
        expected = {("all_reduce", 2 * 33 * world), ("all_reduce", 2 * 168 * world)}
        assert set(sent["notes"]) == (expected if world > 1 else set())
        # The default one, the optimizer's own, and columns and rows of neither one nor all.
        part = sum(1 < n < world for n in (shape.height, shape.width))
        assert sent["groups"] == (1 if world == 1 else 2 + part)


def sizes(calls):
    assert {name for name, _ in calls} <= {"broadcast"}
    return sorted(n for _, n in calls)


def subset(place):
    """Training on two of three processes, in an order of their own."""
    with place.group():
        group = dist.new_group([1, 2])
        if place.rank == 0:
            return None
        work = Assignment(Communicator(group), 0.5)
        parts = [(i, [torch.full((3,), 10.0 * place.rank + i)]) for i in range(2)]
        work.share_gradients(parts)
        return [tensors[0].tolist() for _, tensors in parts]


def test_exchange_in_a_part_of_the_processes(tmp_path):
    """Inverters are numbered within the group that trains."""
    outsider, *members = launch(subset, 3, tmp_path, timeout=60.0, collective=20.0)
    assert outsider is None
    assert members == [[[10.0] * 3, [21.0] * 3]] * 2


def test_alone():
    """Without processes nothing is shared, and one does everything."""
    work = Assignment(Communicator(), 1.0)
    tensor = torch.ones(3)
    for share in (work.share_inverses, work.share_gradients, work.share_notes):
        share([(0, [tensor])])
    assert torch.equal(tensor, torch.ones(3))
    assert work.inverts(0)
    assert work.preconditions(0)
    assert not work.shares_gradients
    assert work.inverters([3, 1, 2]) == [0, 0, 0]
