"""``diagnostics()``: figures that a hand calculation confirms."""

import pytest
import torch
from torch import nn

from mkor import MKOR
from oracles import window as oracles
from support.contestants import ROWS, backward, factors, same, seeded, train, weights
from support.recording import Recorder, gradients

HOW = {"rank": 7, "vectors": 3, "momentum": 0.9, "damping": 0.05, "rows": None}


def trained(steps=5, watched=False, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    recorder = Recorder(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = MKOR(model, base, **(HOW | {"skip_output": False} | how))
    twins = {
        name: oracles.TwinLayer(
            rank=7, vectors=3, momentum=0.9, damping=0.05, bias=True, sides=how.get("sides", "both")
        )
        for name in ("0", "2")
    }
    if watched:
        optimizer.diagnostics()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(11, 6, dtype=torch.float64)).square().mean().backward()
        for name, groups in recorder.take().items():
            twins[name].update(groups[0])
        raw = {name: M[0] for name, M in gradients(model).items()}
        optimizer.step()
    return optimizer, twins, raw


@pytest.mark.parametrize("rescale", [None, "step", "running"])
def test_cosine_and_norm_ratio(rescale):
    """Between the raw and the preconditioned gradient, before any rescaling."""
    optimizer, twins, raw = trained(rescale=rescale, watched=True)
    figures = optimizer.diagnostics()
    for name, M in raw.items():
        P = twins[name].precondition(M)
        assert figures[f"{name}/norm_ratio"] == pytest.approx((P.norm() / M.norm()).item())
        cosine = (P * M).sum() / (P.norm() * M.norm())
        assert figures[f"{name}/cosine"] == pytest.approx(cosine.item())
    assert figures["mkor/mean_cosine"] == pytest.approx(
        (figures["0/cosine"] + figures["2/cosine"]) / 2
    )


def test_cosine_is_measured_once_asked_for():
    """The first call costs the steps before it nothing, so it has no cosine to tell."""
    optimizer, _, _ = trained()
    assert not any("cosine" in name for name in optimizer.diagnostics())


def test_lambda_and_effective_rank():
    """Lambda as in section 2.3; the effective rank is ``sum mu / (mu + lambda)``."""
    optimizer, twins, _ = trained()
    figures = optimizer.diagnostics()
    for name, twin in twins.items():
        for side, vectors, squares in (
            ("left", [s.g for s in twin.history], [s.g_square for s in twin.history]),
            ("right", [s.a for s in twin.history], [s.a_square for s in twin.history]),
        ):
            lam = 0.05 * oracles.running_mean(squares, 0.9)
            assert figures[f"{name}/{side}_lambda"] == pytest.approx(lam)
            mu = torch.linalg.eigvalsh(oracles.window_matrix(vectors, 0.0, 7, 0.9))
            expected = (mu / (mu + lam)).sum().item()
            assert figures[f"{name}/{side}_effective_rank"] == pytest.approx(expected)


def test_totals():
    optimizer, _, _ = trained()
    figures = optimizer.diagnostics()
    assert figures["mkor/layers"] == 2
    assert figures["mkor/steps"] == figures["mkor/updates"] == 5
    assert figures["mkor/refused_updates"] == figures["mkor/raw_gradients"] == 0
    optimizer, _, _ = trained(update_every=2)
    assert optimizer.diagnostics()["mkor/updates"] == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side(side):
    optimizer, _, _ = trained(sides=side)
    figures = optimizer.diagnostics()
    other = {"left": "right", "right": "left"}[side]
    assert any(side in name for name in figures)
    assert not any(other in name for name in figures)


@pytest.mark.parametrize("name", ROWS)
def test_any_logger_takes_it(name):
    """Plain floats under plain strings, before the first step, after it and after ``close``."""
    model = seeded()
    optimizer = ROWS[name].make(model)
    optimizer.diagnostics()
    train(model, optimizer, 2)
    figures = optimizer.diagnostics()
    assert all(type(key) is str and type(value) is float for key, value in figures.items())
    assert all(torch.tensor(value).isfinite() for value in figures.values())
    layers = {key.rsplit("/", 1)[0] for key in figures} - {"mkor"}
    assert layers == {"conv", "first", "again"}
    optimizer.close()
    optimizer.diagnostics()


def test_calling_it_changes_nothing():
    model, other = seeded(), seeded()
    row = ROWS["mkor+adamw"]
    a, b = row.make(model), row.make(other)
    for i in range(4):
        a.zero_grad()
        b.zero_grad()
        backward(model, i)
        backward(other, i)
        a.diagnostics()
        a.coverage()
        a.step()
        a.diagnostics()
        b.step()
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))
