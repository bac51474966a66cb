"""A batch with NaN or inf never poisons the factors, and is counted."""

import pytest
import torch
from torch import nn

from support.contestants import (
    ROWS,
    backward,
    base_state,
    batch,
    factors,
    grads,
    same,
    seeded,
    train,
    weights,
)

CHOSEN = [
    "mkor+sgd",
    "mkor+adamw",
    "mkor+adamw-fused",
    "mkor+muon",
    "mkor[left,step]+adamw",
    "mkor[bfloat16]+adamw",
    "mkor-h+adamw",
    "dense[exact]+adamw",
    "dense[release,float16]+adamw",
    "kfac+sgd-momentum",
    "kfac[pi,running]+adamw",
    "eva+adamw",
]
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=CHOSEN, name="row")
def _row(request):
    return ROWS[request.param]


def counted(optimizer):
    """Events that ``diagnostics`` knows of: of either kind."""
    figures = optimizer.diagnostics()
    return figures["mkor/raw_gradients"] + figures["mkor/refused_updates"]


def in_input(model, bad):
    """One pixel of one image."""
    x, y = batch(40)
    x[3, 0, 2, 2] = bad
    nn.functional.cross_entropy(model(x), y).backward()


def in_every_input(model, bad):
    x, y = batch(40)
    nn.functional.cross_entropy(model(x + bad), y).backward()


def in_activation(model, bad):
    """Between two layers, in one row of the batch that the loss then does not even look at."""
    x, y = batch(40)

    def poison(_module, _inputs, output):
        output = output.clone()
        output[5, 0] = bad
        return output

    handle = model.norm.register_forward_hook(poison)
    out = model(x)
    handle.remove()
    keep = torch.arange(12) != 5
    nn.functional.cross_entropy(out[keep], y[keep]).backward()


def in_gradient(model, bad):
    """In the backward pass only, as from a loss that divides by 0."""
    x, y = batch(40)
    out = model(x)

    def poison(g):
        g = g.clone()
        g[7, 1] = bad
        return g

    out.register_hook(poison)
    nn.functional.cross_entropy(out, y).backward()


def in_inner_gradient(model, bad):
    """Only layers before the normalisation meet it; those after it have seen a good batch."""
    x, y = batch(40)
    handle = model.norm.register_forward_hook(
        lambda _m, _i, out: out.register_hook(lambda g: g + bad) and None
    )
    out = model(x)
    handle.remove()
    nn.functional.cross_entropy(out, y).backward()


def in_loss(model, bad):
    x, y = batch(40)
    (nn.functional.cross_entropy(model(x), y) * bad).backward()


PLACES = [in_input, in_every_input, in_activation, in_gradient, in_inner_gradient, in_loss]


@pytest.mark.parametrize("where", PLACES)
def test_no_factor_changes(row, where):
    """Whatever is not finite, wherever it is: every factor stays bitwise as it was."""
    # In turn: every row and every place meet each value.
    bad = BAD[(PLACES.index(where) + list(ROWS.values()).index(row)) % len(BAD)]
    model = seeded()
    optimizer = row.make(model, nonfinite="skip")
    train(model, optimizer, 3)
    before = factors(optimizer), weights(model), base_state(optimizer)
    refused = optimizer.diagnostics()["mkor/refused_updates"]
    optimizer.zero_grad()
    where(model, bad)
    assert not all(g.isfinite().all() for g in grads(model))
    optimizer.step()
    assert same(before[0], factors(optimizer))
    assert optimizer.diagnostics()["mkor/refused_updates"] > refused
    assert same(before[1], weights(model))
    assert same(before[2], base_state(optimizer))
    assert optimizer.diagnostics()["mkor/skipped_steps"] == 1
    train(model, optimizer, 2, 3)
    assert all(p.isfinite().all() for p in weights(model))
    assert not same(before[0], factors(optimizer))


def test_bad_batch_in_one_micro_batch(row):
    """One bad micro-batch spoils the whole step's statistics, not the next step's."""
    model = seeded()
    optimizer = row.make(model, nonfinite="skip")
    train(model, optimizer, 3)
    before = factors(optimizer)
    optimizer.zero_grad()
    backward(model, 3)
    in_loss(model, float("nan"))
    backward(model, 4)
    optimizer.step()
    assert same(before, factors(optimizer))


def test_first_batch_is_bad(row):
    """Nothing to fall back on: the factors are still those of a fresh optimizer, and recover."""
    model = seeded()
    optimizer = row.make(model, nonfinite="skip")
    in_loss(model, float("nan"))
    optimizer.step()
    assert all(f.float().isfinite().all() for f in factors(optimizer))
    train(model, optimizer, 3)
    assert all(p.isfinite().all() for p in weights(model))
    assert all(f.float().isfinite().all() for f in factors(optimizer))


def test_propagate_is_torch_behaviour():
    """By default the base steps on what it gets, as without a wrapper."""
    for where in (in_loss, in_gradient):
        model, plain = seeded(), seeded()
        row = ROWS["mkor+sgd"]
        optimizer, base = row.make(model), row.base(plain.parameters())
        for m, o in ((model, optimizer), (plain, base)):
            where(m, float("nan"))
            o.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.isnan(), q.isnan())
        assert not all(p.isfinite().all() for p in model.parameters())


def test_raw_gradient_where_the_preconditioned_is_not_finite(row):
    """One inf that someone put into a gradient does not spread over the whole layer."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    backward(model, 3)
    model.first.weight.grad[1, 2] = float("inf")
    raw = [p.grad.clone() for p in model.first.parameters()]
    before = counted(optimizer)
    optimizer.step()
    assert same(raw, [p.grad for p in model.first.parameters()])
    assert counted(optimizer) > before


@pytest.mark.parametrize("name", ["left", "right"])
@pytest.mark.parametrize("kind", ["mkor+sgd", "dense[paper]+sgd", "kfac+sgd-momentum", "eva+adamw"])
def test_broken_factor_gives_the_raw_gradient(kind, name):
    """If a factor itself should ever be broken, training goes on with raw gradients, counted."""
    model = seeded()
    optimizer = ROWS[kind].make(model)
    train(model, optimizer, 3)
    entry = optimizer.state[model.first.weight]
    broken = [k for k, v in entry.items() if name in k and v.is_floating_point()]
    assert broken
    for key in broken:
        entry[key].fill_(float("nan"))
    optimizer.zero_grad()
    backward(model, 3)
    raw = [p.grad.clone() for p in model.first.parameters()]
    other = model.conv.weight.grad.clone()
    before = optimizer.diagnostics()["mkor/raw_gradients"]
    optimizer.step()
    assert same(raw, [p.grad for p in model.first.parameters()])
    assert optimizer.diagnostics()["mkor/raw_gradients"] > before
    assert not torch.equal(other, model.conv.weight.grad)
    assert all(p.isfinite().all() for p in weights(model))


def test_overflow_of_the_preconditioned_gradient():
    """Gradients near the largest float whose product overflows come back raw, and are counted."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = ROWS["mkor+sgd"].make(model, rescale=None)
    x = torch.randn(8, 4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    model[0].weight.grad.fill_(3e38)
    raw = [p.grad.clone() for p in model[0].parameters()]
    before = counted(optimizer)
    optimizer.step()
    assert same(raw, [p.grad for p in model[0].parameters()])
    assert counted(optimizer) > before


def test_skipping_without_gradients(row):
    """``nonfinite="skip"`` takes a step in which no parameter has a gradient."""
    model = seeded()
    optimizer = row.make(model, nonfinite="skip")
    before = weights(model)
    optimizer.step()
    assert same(before, weights(model))
    train(model, optimizer, 2)
    assert not same(before, weights(model))
