"""Every optimizer of the library over every kind of base: the base sees preconditioned gradients.

``test_contract`` makes its promises of MKOR over each of these bases; here are the other wrappers,
and what is particular to a base.
"""

import copy
import io

import pytest
import torch

import mkor
from support import contestants
from support.contestants import BASES, base_state, batch, factors, same, seeded, train, weights

WRAPPERS = {
    "mkor": contestants.windows,
    "dense": contestants.dense,
    "kfac": contestants.kfac,
    "eva": contestants.eva,
}


def tensor_rate(parameters):
    """As compiled steps want it."""
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.01))


ALL_BASES = BASES | {"adamw-tensor-lr": tensor_rate}


@pytest.fixture(params=WRAPPERS, name="wrapper")
def _wrapper(request):
    return WRAPPERS[request.param]


def row_over(wrapper, base, **how):
    row = wrapper("sgd", **how)
    return contestants.Row(row.wrap, ALL_BASES[base], row.defaults)


def recorded(optimizer):
    """The gradients that the base finds in each of its steps."""
    found = []

    def record(base, *_):
        parameters = [p for group in base.param_groups for p in group["params"]]
        found.append([None if p.grad is None else p.grad.clone() for p in parameters])

    optimizer.base.register_step_pre_hook(record)
    return found


def replayed(base, steps):
    """A base alone, stepped on recorded gradients."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    for gradients in steps:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        base.step()
    return base


@pytest.mark.parametrize("name", ALL_BASES)
def test_base_takes_its_own_step(wrapper, name):
    """It moves weights and state as it would alone on the same gradients, which are new ones."""
    row = row_over(wrapper, name)
    model, other, plain = seeded(), seeded(), seeded()
    optimizer = row.make(model)
    gradients = recorded(optimizer)
    losses = train(model, optimizer, 5)
    base = replayed(row.base(other.parameters()), gradients)
    assert same(weights(model), weights(other))
    assert same(base_state(optimizer), base_state(base))
    assert all(torch.tensor(losses).isfinite())
    train(plain, row.base(plain.parameters()), 5)
    assert not same(weights(model), weights(plain))


# Bases take the wrappers in turn; ``test_contract`` resumes MKOR over those of ``BASES``.
OTHERS = [key for key in WRAPPERS if key != "mkor"]
RESUMED = [("mkor", "adamw-tensor-lr")] + [
    (OTHERS[i % len(OTHERS)], name) for i, name in enumerate(ALL_BASES)
]


@pytest.mark.parametrize(("key", "name"), RESUMED)
def test_resume(key, name):
    """From a file that holds plain types only."""
    row = row_over(WRAPPERS[key], name)
    model, other = seeded(), seeded(seed=1)
    optimizer = row.make(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    expected = train(model, optimizer, 4, 3)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state[0])
    resumed = row.make(other)
    resumed.load_state_dict(state[1])
    assert train(other, resumed, 4, 3) == expected
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(resumed))
    assert same(base_state(optimizer), base_state(resumed))


def test_fused_base_with_a_scaler(wrapper):
    """A fused base would unscale by itself; below the wrapper the scaler does, before the step."""
    row = row_over(wrapper, "adamw-fused")
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.loss_scale = 256.0
    for i in range(3):
        optimizer.zero_grad()
        x, y = batch(i)
        scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, expected, 3)
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_capturable_base(wrapper):
    """Its steps count on the device; on a CPU only the fused ones do."""
    row = wrapper("adamw")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model, other = seeded().to(device), seeded().to(device)
    runs = []
    for net, how in ((model, {"capturable": True, "fused": not on_gpu}), (other, {})):
        optimizer = row.over(net, torch.optim.AdamW(net.parameters(), lr=0.01, **how))
        for i in range(4):
            optimizer.zero_grad()
            x, y = (t.to(device) for t in batch(i))
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        runs.append(weights(net))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------- eight bits


def test_eight_bit_state(wrapper):
    """The base's moments stay bytes, in memory and in a checkpoint; factors are not touched."""
    model = seeded()
    optimizer = row_over(wrapper, "adamw-8bit").make(model)
    train(model, optimizer, 3)
    for entry in (optimizer.state[model.first.weight], optimizer.state_dict()["state"][2]):
        assert entry["state1"].dtype == entry["state2"].dtype == torch.uint8
        assert entry["state1"].shape == model.first.weight.shape
    assert not any(f.dtype == torch.uint8 for f in factors(optimizer))


# ----------------------------------------------------------------------------- schedule-free


def test_schedule_free_modes(wrapper):
    """In its evaluation mode the weights are the averages; they are those of the base alone."""
    row = row_over(wrapper, "schedule-free")
    model, other = seeded(), seeded()
    optimizer = row.make(model)
    gradients = recorded(optimizer)
    train(model, optimizer, 4)
    trained = weights(model)
    optimizer.eval()
    base = replayed(row.base(other.parameters()), gradients)
    base.eval()
    assert same(weights(model), weights(other))
    assert not same(weights(model), trained)
    with torch.no_grad():
        model(batch(9)[0])
    kept = factors(optimizer)
    optimizer.train()
    assert same(kept, factors(optimizer))
    for p, q in zip(weights(model), trained, strict=True):
        torch.testing.assert_close(p, q)


def test_schedule_free_refuses_to_step_in_evaluation_mode(wrapper):
    """Its own error comes through, and nothing is lost by it."""
    model = seeded()
    optimizer = row_over(wrapper, "schedule-free").make(model)
    train(model, optimizer, 3)
    optimizer.eval()
    before, kept = weights(model), len(factors(optimizer))
    with pytest.raises(Exception, match="not in train mode"):
        train(model, optimizer, 1, 3)
    assert same(before, weights(model))
    assert len(factors(optimizer)) == kept
    optimizer.train()
    train(model, optimizer, 2, 3)
    assert not same(before, weights(model))


def test_schedule_free_checkpoint_of_evaluation_mode(wrapper):
    """Saved as its authors ask for, with the averages in the model, it goes on in training mode."""
    row = row_over(wrapper, "schedule-free")
    model, other = seeded(), seeded(seed=1)
    optimizer, resumed = row.make(model), row.make(other)
    train(model, optimizer, 3)
    optimizer.eval()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    optimizer.train()
    resumed.train()
    assert train(model, optimizer, 3, 3) == train(other, resumed, 3, 3)
    assert same(weights(model), weights(other))


def test_modes_of_other_bases(wrapper):
    """Frameworks call ``train`` and ``eval`` wherever they find them: most bases have no modes."""
    model = seeded()
    optimizer = row_over(wrapper, "adamw").make(model)
    train(model, optimizer, 2)
    before = weights(model)
    optimizer.eval()
    optimizer.train()
    assert same(before, weights(model))


def test_modes_of_a_part():
    """Of a combined base, those parts change that have modes."""
    model, other = seeded(), seeded()
    first, *rest = model.parameters()
    base = mkor.Combined(contestants.schedule_free(rest), torch.optim.SGD([first], lr=0.1))
    optimizer = mkor.MKOR(model, base, **contestants.WINDOW)
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    optimizer.eval()
    assert torch.equal(model.conv.weight, other.conv.weight)
    assert not same(weights(model.first), weights(other.first))
    optimizer.train()
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q)
