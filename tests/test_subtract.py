"""Products of whitened vectors with a gradient, whole and by rows, against dense matrices."""

import math

import pytest
import torch

from mkor import linalg
from mkor.linalg import windows

F64 = torch.float64
ROWS = 7


@pytest.fixture
def pieces(monkeypatch):
    """Weights of any size are handled by rows; how many rows each time."""
    found, subtract = [], windows._subtract_right

    def noting(U, across, u, W, b, only):
        found.append(W.shape[1])
        subtract(U, across, u, W, b, only)

    monkeypatch.setattr(windows, "_subtract_right", noting)
    for name, value in {"LARGE": 0, "WIDE": 0, "CACHED": 0, "FEWEST": ROWS}.items():
        monkeypatch.setattr(windows, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


def whitened(layers, rank, width, dtype):
    """Rows whose products have eigenvalues in [0, 1), as those of windows have."""
    U = torch.randn(layers, rank, width, dtype=F64)
    return (0.9 * U / torch.linalg.matrix_norm(U, 2).view(-1, 1, 1)).to(dtype)


DTYPES, BIASES = [torch.float32, F64], ["", "left out", "trained"]
D_OUTS = [1, 6, 7, 8, 21, 33]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("d_out", D_OUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_both_sides_by_rows(dtype, bias, d_out, masked, pieces):
    # In turn: both meet every other setting, and each other, in either way.
    turn = BIASES.index(bias) + D_OUTS.index(d_out)
    layers, transposed = (1, 3)[(turn + masked) % 2], (turn + DTYPES.index(dtype)) % 2 == 0
    d_in, rank = 19, 4
    left, both = (whitened(layers, rank, d, dtype) for d in (d_out, d_in + 1))
    right, u = both[..., :-1].contiguous(), both[..., -1].contiguous()
    W, b = torch.randn(layers, d_out, d_in, dtype=dtype), torch.randn(layers, d_out, dtype=dtype)
    only = torch.arange(layers) % 2 == 0 if masked else None
    M = torch.cat([W, b.unsqueeze(2)], 2).double()
    if bias != "trained":
        both, M, b = both[..., :-1], M[..., :-1], None
    projected = M - left.double().mT @ (left.double() @ M)
    expected = projected - (projected @ both.double().mT) @ both.double()
    if only is not None:
        expected = torch.where(only.view(-1, 1, 1), expected, M)
    given = W.mT.contiguous().mT if transposed else W
    linalg.subtract_both(left, right, u if bias else None, given, b, only)
    found = given if b is None else torch.cat([given, b.unsqueeze(2)], 2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    assert len(pieces) == math.ceil(d_out / ROWS)
    assert sum(pieces) == d_out


def test_small_weights_are_handled_whole(pieces, monkeypatch):
    """And all where several threads share each product."""
    U, W = whitened(1, 4, 20, F64), torch.randn(1, 20, 20, dtype=F64)
    for large, wide, cached, threads, count in (
        (401, 20, 0, 1, 1),
        (400, 21, 0, 1, 1),
        (400, 20, 0, 2, 1),
        (400, 20, 0, 1, 3),
        (400, 20, 10 * 20, 1, 2),
    ):
        monkeypatch.setattr(windows, "LARGE", large)
        monkeypatch.setattr(windows, "WIDE", wide)
        monkeypatch.setattr(windows, "CACHED", cached)
        torch.set_num_threads(threads)
        pieces.clear()
        linalg.subtract_both(U, U, None, W, None, None)
        assert len(pieces) == count
