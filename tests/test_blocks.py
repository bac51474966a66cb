"""Layers cut into blocks: what is put together from them is what is made of the whole."""

import itertools
import math

import pytest
import torch

from mkor.curvature.contract import SIDES, BatchShape, Block, Statistics
from mkor.curvature.dense import DenseInverse
from mkor.curvature.eva import RankOne
from mkor.curvature.kfac import Covariance
from mkor.curvature.window import Window
from oracles_dense import eva_product

F32, F64 = torch.float32, torch.float64
B, D_OUT, D_IN, RANK, DELTA = 3, 6, 4, 3, 0.3
TOLERANCE = {F32: 2e-5, F64: 1e-12}
FACTORS = {
    "window": Window(rank=RANK, vectors=2, rows=None, momentum=0.9, damping=0.1),
    "window, float16": Window(rank=RANK, vectors=2, rows=None, factor_dtype=torch.float16),
    "dense": DenseInverse(vectors=2, momentum=0.9),
    "dense, bfloat16": DenseInverse(momentum=0.9, factor_dtype=torch.bfloat16),
    "kfac": Covariance(momentum=0.9, damping=0.1),
    "eva": RankOne(momentum=0.9, damping=DELTA),
}
SIDED = [
    pytest.param(FACTORS[name], sides, id=f"{name}, {'+'.join(sides)}")
    for name, sides in itertools.product(FACTORS, (SIDES, ("left",), ("right",)))
    if name != "eva" or sides == SIDES
]
ROWS = [(0, 3, 6), (0, 4, 6), (0, 2, 4, 6), (0, 6, 6), (0, 0, 6), (0, 3, 3, 6), (0, 6)]
COLUMNS = [
    ((0, 2, 4), (0, 3, 6)),
    ((0, 3, 4), (0, 1, 6)),
    ((0, 2, 4, 4), (0, 2, 4, 6)),
    ((0, 4, 4), (0, 6, 6)),
    ((0, 4), (0, 6)),
]
"""Where the columns are cut, and where the bias is."""


def parts(edges):
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


WHOLE = (D_OUT, D_IN)
CUTS = [[Block(rows, slice(0, D_IN), rows, WHOLE, "rows") for rows in parts(e)] for e in ROWS] + [
    [
        Block(slice(0, D_OUT), columns, bias, WHOLE, "columns")
        for columns, bias in zip(parts(columns), parts(bias), strict=True)
    ]
    for columns, bias in COLUMNS
]


def shape_of(sides=SIDES, bias=True, dtype=F64):
    return BatchShape(B, D_OUT, D_IN, bias, sides, dtype, torch.device("cpu"))


def learned(curvature, shape, updates=3):
    """A state that has learned from a few random vectors."""
    state = curvature.init(shape)
    for number in range(updates):
        vectors, squares, covariance = {}, {}, {}
        for side in shape.sides:
            rows = torch.randn(shape.layers, 20, shape.width(side), dtype=shape.dtype)
            vectors[side] = rows.tensor_split(curvature.vectors, 1)
            vectors[side] = torch.stack([part.mean(1) for part in vectors[side]], 1)
            full = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
            full = full if shape.full_width(side) > shape.width(side) else rows
            squares[side] = full.square().mean((1, 2))
            covariance[side] = full.mT @ full / 20
        filled = torch.ones(shape.layers, curvature.vectors, dtype=torch.bool)
        accept = torch.ones(shape.layers, dtype=torch.bool)
        curvature.update(
            state, Statistics(vectors, squares, filled, accept, number, None, covariance)
        )
        if hasattr(curvature, "renew"):
            curvature.renew(state, accept)
    return state


def prepared_for(curvature, sides=SIDES, bias=True, dtype=F64):
    shape = shape_of(sides, bias, dtype)
    return curvature.prepare(learned(curvature, shape), shape)


def gradients(bias=True, dtype=F64):
    W = torch.randn(B, D_OUT, D_IN, dtype=dtype)
    return W, torch.randn(B, D_OUT, dtype=dtype) if bias else None


def cut(W, b, block):
    """The block's own copies."""
    own = W[:, block.rows, block.columns].clone()
    return own, None if b is None else b[:, block.bias].clone()


def in_blocks(curvature, prepared, W, b, ok, blocks):
    """What all blocks together make of the gradients, and what each says of them."""
    own = [cut(W, b, block) for block in blocks]
    projected = sum(
        curvature.project(prepared, *pair, block) for pair, block in zip(own, blocks, strict=True)
    )
    assert projected.dtype == W.dtype
    P, p = torch.full_like(W, math.nan), None if b is None else torch.full_like(b, math.nan)
    said = []
    for (Q, q), block in zip(own, blocks, strict=True):
        said.append(curvature.complete(prepared, Q, q, projected.clone(), ok.clone(), block))
        P[:, block.rows, block.columns] = Q
        if p is not None:
            p[:, block.bias] = q
    assert all(torch.equal(done, said[0]) for done in said)
    return P, p, said[0]


def whole(curvature, prepared, W, b, ok):
    W, b = W.clone(), None if b is None else b.clone()
    return W, b, curvature.apply(prepared, W, b, ok)


def everything():
    return torch.ones(B, dtype=torch.bool)


def bits(x):
    return x.contiguous().view(torch.int64 if x.dtype == F64 else torch.int32)


def assert_same(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).norm() <= tolerance * y.norm()


# ------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("bias", "dtype"),
    [("bias", F64), ("no bias", F64), ("bias without gradient", F64), ("bias", F32)],
    ids=str,
)
@pytest.mark.parametrize(("curvature", "sides"), SIDED)
def test_put_together(curvature, sides, bias, dtype):
    prepared = prepared_for(curvature, sides, bias != "no bias", dtype)
    W, b = gradients(bias == "bias", dtype)
    *expected, done = whole(curvature, prepared, W, b, everything())
    assert done.all()
    assert (expected[0] - W).norm() > 0.01 * W.norm()
    half = getattr(curvature, "factor_dtype", None) is torch.bfloat16
    for blocks in CUTS:
        *found, done = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert done.all()
        assert_same(found, expected, 0.01 if half else TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sides", [SIDES, ("left",), ("right",)], ids="+".join)
@pytest.mark.parametrize("name", ["window", "dense", "kfac"])
def test_products_with_matrices(name, sides, bias):
    """``L^-1 [W b] R^-1`` with the inverses written out."""
    curvature = FACTORS[name]
    prepared = prepared_for(curvature, sides, bias)
    W, b = gradients(bias)
    expected = W if b is None else torch.cat([W, b.unsqueeze(2)], 2)
    for side in sides:
        inverse = prepared[side]
        if name == "window":
            if side == "right" and bias:
                inverse = torch.cat([inverse, prepared["bias"].unsqueeze(2)], 2)
            inverse = torch.eye(inverse.shape[2], dtype=F64) - inverse.mT @ inverse
        expected = inverse @ expected if side == "left" else expected @ inverse
    for blocks in CUTS:
        P, p, _ = in_blocks(curvature, prepared, W, b, everything(), blocks)
        found = P if p is None else torch.cat([P, p.unsqueeze(2)], 2)
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_closed_form():
    curvature = FACTORS["eva"]
    prepared = prepared_for(curvature)
    W, b = gradients()
    for blocks in CUTS:
        P, p, _ = in_blocks(curvature, prepared, W, b, everything(), blocks)
        for i in range(B):
            M = torch.cat([W[i], b[i, :, None]], 1)
            expected = eva_product(M, prepared["right"][i], prepared["left"][i], DELTA)
            found = torch.cat([P[i], p[i, :, None]], 1)
            assert (found - expected).norm() <= 1e-12 * expected.norm()


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("sides", "rows", "columns"),
    [
        (SIDES, RANK * (D_IN + 1) + 1, RANK * (D_OUT + 1) + 1),
        (("left",), RANK * (D_IN + 1) + 1, RANK + 1),
        (("right",), 1, RANK * D_OUT + 1),
    ],
    ids=["both", "left", "right"],
)
def test_numbers_of_the_window(sides, rows, columns):
    """``r`` times the width that is not cut, for one side only; as many for every block."""
    curvature = FACTORS["window"]
    prepared = prepared_for(curvature, sides)
    for block in itertools.chain(*CUTS):
        projected = curvature.project(prepared, *cut(*gradients(), block), block)
        assert projected.shape == (B, rows if block.cut == "rows" else columns)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("eva", 2), ("dense", D_OUT * (D_IN + 1)), ("kfac", D_OUT * (D_IN + 1))],
)
def test_numbers_of_the_others(name, numbers):
    curvature = FACTORS[name]
    prepared = prepared_for(curvature)
    for block in itertools.chain(*CUTS):
        projected = curvature.project(prepared, *cut(*gradients(), block), block)
        assert projected.shape == (B, numbers)


def test_blocks_are_keys():
    """Layers whose blocks are the same are handled together."""
    first, second = (dict.fromkeys(blocks) for blocks in (CUTS[0], CUTS[0]))
    assert first.keys() == second.keys()
    assert len(set(itertools.chain(*CUTS))) > len(CUTS)
    same = (slice(0, D_OUT), slice(0, D_IN), slice(0, D_OUT), WHOLE)
    assert Block(*same, "rows") != Block(*same, "columns")


# ------------------------------------------------------------------------- what is left untouched


def assert_raw(found, W, b, layer):
    P, p, done = found
    assert not done[layer]
    assert torch.equal(bits(P[layer]), bits(W[layer]))
    if b is not None:
        assert torch.equal(bits(p[layer]), bits(b[layer]))


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not a number"])
@pytest.mark.parametrize(("curvature", "sides"), SIDED)
def test_layers_that_are_not_ok(curvature, sides, bad):
    prepared = prepared_for(curvature, sides)
    W, b = gradients()
    *expected, _ = whole(curvature, prepared, W, b, everything())
    if bad:
        W[1, 2, 3] = math.nan
    ok = torch.tensor([True, False, True])
    half = getattr(curvature, "factor_dtype", None) is torch.bfloat16
    for blocks in CUTS:
        found = in_blocks(curvature, prepared, W, b, ok, blocks)
        assert found[2].tolist() == ok.tolist()
        assert_raw(found, W, b, 1)
        others = [[x[::2] for x in pair[:2]] for pair in (found, expected)]
        assert_same(*others, 0.01 if half else 1e-12)


@pytest.mark.parametrize("where", [(0, 0), (5, 3), (0, None), (5, None)], ids=str)
@pytest.mark.parametrize(("curvature", "sides"), SIDED)
def test_an_entry_that_is_not_finite(curvature, sides, where):
    """In whichever block it is, all blocks of its layer stay as they are, and say so."""
    prepared = prepared_for(curvature, sides)
    W, b = gradients()
    row, column = where
    # Cuts take the values in turn: each meets cuts of rows and of columns.
    for blocks, value in zip(CUTS, itertools.cycle([math.nan, math.inf, -math.inf])):
        if column is None:
            b[2, row] = value
        else:
            W[2, row, column] = value
        found = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert found[2].tolist() == [True, True, False]
        assert_raw(found, W, b, 2)
        assert found[0][:2].isfinite().all()


@pytest.mark.parametrize("size", [1e30, 1e37, 3e38])
@pytest.mark.parametrize(("curvature", "sides"), SIDED)
def test_entries_near_overflow(curvature, sides, size):
    """All blocks are preconditioned and finite, or all of them raw."""
    prepared = prepared_for(curvature, sides, dtype=F32)
    W, b = gradients(dtype=F32)
    W[1, 5], b[1, 5] = size, -size
    for blocks in CUTS:
        found = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert found[2].tolist()[::2] == [True, True]
        if found[2][1]:
            assert found[0].isfinite().all()
            assert found[1].isfinite().all()
            assert not torch.equal(found[0][1], W[1])
        else:
            assert size > 1e30
            assert_raw(found, W, b, 1)


@pytest.mark.parametrize("sizes", [(0.01, 10.0), (10.0, 0.01)], ids=str)
def test_products_that_overflow_on_the_way(sizes):
    """The small factor comes first, or last; which depends on how the layers are cut."""
    widths = {"left": D_OUT, "right": D_IN + 1}
    prepared = {
        side: size * torch.eye(width).expand(B, -1, -1)
        for (side, width), size in zip(widths.items(), sizes, strict=True)
    }
    W, b = gradients(dtype=F32)
    W[0], b[0] = 1e38, -1e38
    for blocks in CUTS:
        P, p, done = in_blocks(FACTORS["dense"], prepared, W, b, everything(), blocks)
        assert done.tolist()[1:] == [True, True]
        if done[0]:
            assert (P[0] - 1e37).abs().max() < 1e32
        else:
            assert_raw((P, p, done), W, b, 0)


def test_window_that_is_too_large():
    """Such as rounding never makes: its products overflow, and no block uses them."""
    curvature = FACTORS["window"]
    prepared = prepared_for(curvature, dtype=F32)
    for side in SIDES:
        prepared[side][0] *= 1e25
    W, b = gradients(dtype=F32)
    W[0] *= 1e20
    for blocks in CUTS:
        found = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert found[2].tolist() == [False, True, True]
        assert_raw(found, W, b, 0)


@pytest.mark.parametrize(("curvature", "sides"), SIDED)
def test_damaged_factors(curvature, sides):
    shape = shape_of(sides)
    state = learned(curvature, shape)
    for key, tensor in state.items():
        if tensor.dim() > 1 and "weights" not in key and "covariance" not in key:
            tensor[0, 0] = math.nan
    prepared = curvature.prepare(state, shape)
    W, b = gradients()
    for blocks in CUTS:
        found = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert found[2].tolist() == [False, True, True]
        assert_raw(found, W, b, 0)


def test_no_inverse_yet():
    curvature, shape = FACTORS["kfac"], shape_of()
    state = learned(curvature, shape)
    state["inverted"][1] = False
    prepared = curvature.prepare(state, shape)
    W, b = gradients()
    for blocks in CUTS:
        found = in_blocks(curvature, prepared, W, b, everything(), blocks)
        assert found[2].tolist() == [True, False, True]
        assert_raw(found, W, b, 1)
