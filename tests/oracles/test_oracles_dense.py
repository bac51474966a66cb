"""The dense oracles checked by themselves: printed formulas, and answers known without them."""

import itertools
import math

import pytest
import torch

from oracles import dense as oracles
from oracles.dense import DenseLayer, EvaLayer, KFACLayer, eye

F64 = torch.float64
GAMMA = 0.9


def positive(d=5):
    X = torch.randn(d, d, dtype=F64)
    return X @ X.T + 0.1 * eye(d)


def printed(rule, H, v, gamma):
    """The table of section 2.3, for one vector."""
    vHv, HvvH = v @ H @ v, torch.outer(H @ v, H @ v)
    if rule == "exact":
        c = (1 - gamma) / gamma
        return H / gamma - c / gamma * HvvH / (1 + c * vHv)
    if rule == "paper":
        c = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * vHv))
        return gamma * H + c * HvvH
    B = gamma * H + (1 - gamma) * eye(len(H))
    return B - B @ torch.outer(v, v) @ B / (1 + v @ B @ v)


@pytest.mark.parametrize("rule", oracles.RULES)
def test_rules_are_the_printed_ones(rule):
    H, v = positive(), torch.randn(5, dtype=F64)
    found, _ = oracles.dense_update(H, [v], rule, GAMMA)
    torch.testing.assert_close(found, printed(rule, H, v, GAMMA))


@pytest.mark.parametrize("rule", oracles.RULES)
def test_several_vectors(rule):
    """Decay once; ``k`` equal vectors are one, and order means nothing, but for the paper's."""
    v, H = [torch.randn(5, dtype=F64) for _ in range(3)], positive()

    def update(vectors):
        return oracles.dense_update(H, vectors, rule, GAMMA)[0]

    for one, other in ((v, v[::-1]), (v[:1] * 3, v[:1])):
        assert torch.allclose(update(one), update(other), rtol=1e-9) == (rule != "paper")
    decayed = {"exact": H / GAMMA, "paper": GAMMA * H, "release": GAMMA * H + (1 - GAMMA) * eye(5)}
    torch.testing.assert_close(update([0 * v[0]] * 3), decayed[rule])


def test_stabilizer_looks_before_each_vector():
    """In the first of two it sees ``H``, then what the first vector has made of it."""
    v = torch.tensor([1.0, 0.0]).double()
    H = torch.diag(torch.tensor([9.0, 2.0])).double()
    _, acted = oracles.dense_update(H, [v], "paper", 0.9, 10.0, 0.4)
    assert acted == 0
    big = oracles.dense_update(H, [3 * v] * 2, "paper", 0.9)[0]
    first, _ = oracles.dense_update(H, [3 * v / 2**0.5], "paper", 0.9)
    assert first.max() > 10
    second, acted = oracles.dense_update(H, [3 * v] * 2, "paper", 0.9, 10.0, 0.4)
    assert acted == 1
    assert second.max() < big.max()
    expected = oracles.with_vector(0.4 * first + 0.6 * eye(2), 3 * v / 2**0.5, "paper", 0.9)
    torch.testing.assert_close(second, expected)


def test_stabilizer_by_hand():
    H = torch.tensor([[4.0, -11.0], [-11.0, 40.0]]).double()
    expected = torch.tensor([[2.2, -4.4], [-4.4, 16.6]]).double()
    torch.testing.assert_close(oracles.stabilized(H, 39.9, 0.4), expected)
    assert oracles.stabilized(H, 40.0, 0.4) is H
    assert oracles.stabilized(H, None, 0.4) is H


def calls(n=6, d_in=3, d_out=2):
    return [(torch.randn(n, 1, d_in, dtype=F64), torch.randn(n, 1, d_out, dtype=F64))]


@pytest.mark.parametrize("rule", oracles.RULES)
def test_dense_layer_begins_with_the_identity(rule):
    layer = DenseLayer(rule=rule, bias=True)
    ((a, g),) = batch = calls()
    layer.update(batch)
    v = torch.cat([a.mean((0, 1)), torch.ones(1, dtype=F64)])
    torch.testing.assert_close(layer.right(), printed(rule, eye(4), v, 0.95))
    torch.testing.assert_close(layer.left(), printed(rule, eye(2), g.sum((0, 1)), 0.95))


def test_covariances_by_hand():
    """Two samples of two rows: ``g`` counts four times its raw value, ``a`` has its one."""
    a = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]).double()
    g = torch.tensor([[[1.0], [0.0]], [[2.0], [0.0]]]).double()
    layer = KFACLayer(bias=True, damping=0.5)
    layer.update([(a, g)])
    left, right = layer.averages()
    assert left.item() == pytest.approx((16 + 64) / 4)
    torch.testing.assert_close(right, torch.tensor([[7.5, 2.5], [2.5, 1.0]]).double())
    assert layer.left().item() == pytest.approx(1 / 20.5)
    torch.testing.assert_close(layer.right() @ (right + 0.5 * eye(2)), eye(2))


def test_pi_correction_by_hand():
    """The product of the dampings stays; the larger side gets the larger share."""
    L, R = 4.0 * eye(2), 9.0 * eye(3)
    left, right = oracles.damped_inverses(L, R, 0.01, True)
    torch.testing.assert_close(left, eye(2) / (4 + 0.1 / 1.5))
    torch.testing.assert_close(right, eye(3) / (9 + 0.1 * 1.5))


def test_inverses_between_inversions():
    layer = KFACLayer(bias=False, inverse_updates=3)
    seen = []
    for _ in range(7):
        layer.update(calls())
        seen.append(layer.left().clone())
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changes == [False, False, True, False, False, True]


def test_eva_closed_form_is_the_kronecker_solve():
    """``(b b^T (x) a a^T + delta I)^-1 vec(M)``, with and without the formula."""
    M = torch.randn(3, 4, dtype=F64)
    b, a = torch.randn(3, dtype=F64), torch.randn(4, dtype=F64)
    expected = oracles.kronecker_solve(M, torch.outer(b, b), torch.outer(a, a), 0.07)
    torch.testing.assert_close(oracles.eva_product(M, a, b, 0.07), expected)
    layer = EvaLayer(bias=False, damping=0.07)
    layer.update(batch := calls(d_in=4, d_out=3))
    ((x, g),) = batch
    expected = oracles.eva_product(M, x.mean((0, 1)), g.sum((0, 1)), 0.07)
    torch.testing.assert_close(layer.precondition(M), expected)


def test_kronecker_solve_of_separate_sides():
    """Without damping it is ``L^-1 M R^-1``: the order of ``vec`` fits that of the product."""
    L, R, M = positive(2), positive(3), torch.randn(2, 3, dtype=F64)
    expected = torch.linalg.inv(L) @ M @ torch.linalg.inv(R)
    torch.testing.assert_close(oracles.kronecker_solve(M, L, R, 0.0), expected)


def test_kl_scale_by_hand():
    P, M = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[2.0, -2.0]]).double()
    assert oracles.kl_scale([(0.5, P, M)], 0.01) == pytest.approx(math.sqrt(0.01 / (0.25 * 4)))
    two = [(0.5, P, M), (1.0, P, -M)]
    assert oracles.kl_scale(two, 0.01) == pytest.approx(math.sqrt(0.01 / 3))
    assert oracles.kl_scale(two, 100.0) == 1.0
    assert oracles.kl_scale([(0.5, 0 * P, M)], 0.01) == 1.0
