"""KAISA's distribution: who does what, and that everybody gets what he needs and no more."""

import itertools
import random

import pytest
import torch

from mkor.distributed.kaisa import Grid, assign, grid

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
