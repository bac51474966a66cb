"""MKOR-H: when it hands over to the base, what is left of the factors then, and checkpoints."""

import copy
import gc
import io
import math
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mkor import KFAC, MKOR, DenseMKOR, Eva, LossRateSwitch
from support.contestants import (
    BASES,
    PREFIX,
    ROWS,
    SWITCH,
    WINDOW,
    Net,
    backward,
    base_state,
    batch,
    factors,
    grads,
    hooks,
    same,
    seeded,
    train,
    weights,
)

HYBRIDS = {
    "mkor-h+adamw": ROWS["mkor-h+adamw"],
    "eva-h[step]+sgd": ROWS["eva-h[step]+sgd"],
}
STEP = 6
"""The step after which these hand over, in a run from the beginning."""


@pytest.fixture(params=HYBRIDS, name="row")
def _row(request):
    return HYBRIDS[request.param]


# ------------------------------------------------------------------------------- the moment


def horizon_weights(n, horizon):
    """What the losses 1 ... n weigh in an average whose horizon at look ``j`` is ``horizon(j)``."""
    shares = [0.0] * n
    for j in range(1, n + 1):
        new = 1 / min(j, horizon(j))
        shares = [share * (1 - new) for share in shares]
        shares[j - 1] = new
    return shares


def rates(losses, smoothing):
    """The rate at each look from the second on: how far the mean fell over how many looks."""
    found = {}
    for n in range(2, len(losses) + 1):
        means, ages = [], []
        for factor in (1, 2):
            shares = horizon_weights(n, lambda j, f=factor: f * max(1.0, smoothing * j))
            assert sum(shares) == pytest.approx(1.0)
            means.append(sum(w * x for w, x in zip(shares, losses, strict=False)))
            ages.append(sum(w * (n - 1 - j) for j, w in enumerate(shares)))
        found[n] = (means[1] - means[0]) / (ages[1] - ages[0])
    return found


def switch_look(losses, settings):
    """The look at which the documented rule switches; None if it does not."""
    best, low_since = 0.0, None
    for n, rate in rates(losses, settings.smoothing).items():
        if n * settings.every <= settings.warmup:
            continue
        best = max(best, rate)
        if rate >= settings.fraction * best:
            low_since = None
            continue
        low_since = low_since or n
        if n - low_since >= settings.patience * n:
            return n
    return None


def falling(n, tau, noise, seed):
    """Losses that fall to a floor in ``tau`` looks."""
    generator = torch.Generator().manual_seed(seed)
    scatter = torch.randn(n, generator=generator).tolist()
    return [2 + 3 * math.exp(-i / tau) + noise * x for i, x in enumerate(scatter)]


def small(**settings):
    """An optimizer of one little layer, to feed with losses."""
    model = nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = LossRateSwitch(**settings)
    return MKOR(model, base, hybrid=switch, skip_output=False, **WINDOW)


def feed(optimizer, losses):
    """One loss, or a list of losses, a step; the moment of the switch."""
    for loss in losses:
        for one in loss if isinstance(loss, list) else [loss]:
            optimizer.report_loss(one)
        optimizer.step()
    return optimizer.switched_at


rules = st.builds(
    LossRateSwitch,
    fraction=st.floats(0.02, 0.9),
    smoothing=st.floats(0.02, 0.95),
    patience=st.floats(0.0, 0.6),
    warmup=st.integers(0, 60),
    every=st.integers(1, 10),
)


@pytest.mark.slow
@given(rules, st.floats(1.0, 40.0), st.sampled_from([0.0, 0.01, 0.3, 3.0]), st.integers(0, 10**6))
def test_moment_is_that_of_the_documented_rule(settings, tau, noise, seed):
    """Against averages with every loss's weight written out, from the whole history."""
    losses = falling(60, tau, noise, seed)
    found = feed(small(**vars(settings)), [x for x in losses for _ in range(settings.every)])
    look = switch_look(losses, settings)
    assert found == (look and look * settings.every)


def test_rate_is_the_slope():
    """Of a loss that falls by as much in every look, whatever the smoothing is."""
    for smoothing in (0.05, 0.3, 0.9):
        found = rates([7 - 0.01 * i for i in range(50)], smoothing)
        assert list(found.values()) == pytest.approx([0.01] * 49)


def test_moment_does_not_depend_on_units():
    """Neither a constant nor a factor of the loss moves it; the parameters have no dimension."""
    settings = LossRateSwitch(warmup=20, every=1)
    losses = falling(200, 15.0, 0.02, 1)
    moment = feed(small(**vars(settings)), losses)
    assert 20 < moment < 200
    assert feed(small(**vars(settings)), [8 * x - 3 for x in losses]) == moment


def test_moment_scales_with_the_run():
    """A run ten times as long, falling ten times as slowly, switches ten times as late."""
    settings = LossRateSwitch(warmup=0, every=1)
    moments = [feed(small(**vars(settings)), falling(n, n / 12, 0.0, 0)) for n in (200, 2000)]
    assert moments[1] / moments[0] == pytest.approx(10, rel=0.15)


PATIENT = {"fraction": 0.3, "smoothing": 0.2, "patience": 0.1, "warmup": 10, "every": 3}


def expected_step(losses, settings=PATIENT):
    rule = LossRateSwitch(**settings)
    means = [
        sum(losses[i : i + rule.every]) / rule.every
        for i in range(0, len(losses) - rule.every + 1, rule.every)
    ]
    look = switch_look(means, rule)
    assert look, "losses that bring no switch show nothing"
    return look * rule.every


def test_a_look_is_the_mean_of_the_losses_since_the_last():
    losses = falling(150, 20.0, 0.05, 0)
    assert feed(small(**PATIENT), losses) == expected_step(losses)


def test_no_switch_before_the_warmup():
    losses = [1.0 + 0.1 * i for i in range(100)]  # only ever rises
    moment = feed(small(**(PATIENT | {"warmup": 60})), losses)
    assert moment == expected_step(losses, PATIENT | {"warmup": 60})
    assert moment > 60


def test_several_losses_a_step():
    """Micro-batches report theirs, more in some looks than in others; the mean counts."""
    losses = falling(150, 20.0, 0.05, 1)
    split = [
        [x - 0.5, x + 0.25, x + 0.25] * (1 + i // PATIENT["every"] % 3)
        for i, x in enumerate(losses)
    ]
    assert feed(small(**PATIENT), split) == expected_step(losses)


def test_switch_is_for_good():
    """What is reported later is taken without complaint and changes nothing."""
    optimizer = small(**PATIENT)
    losses = falling(150, 20.0, 0.05, 0)
    moment = feed(optimizer, losses)
    assert moment == expected_step(losses)
    assert feed(optimizer, [100.0 - i for i in range(50)]) == moment


# --------------------------------------------------------------------------------- the losses

KINDS = {
    "float": float,
    "tensor": torch.tensor,
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "one entry": lambda x: torch.tensor([[x]]),
    "requires grad": lambda x: torch.tensor(x, requires_grad=True) * 1,
    "parameter": lambda x: nn.Parameter(torch.tensor(x)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_losses(kind):
    losses = falling(150, 20.0, 0.05, 2)
    optimizer = small(**PATIENT)
    assert feed(optimizer, [KINDS[kind](x) for x in losses]) == expected_step(losses)


def test_integers_and_half_precision():
    """Not precise, but losses."""
    losses = [torch.tensor(5.0, dtype=torch.bfloat16), 3, torch.tensor(2), torch.tensor(0.5).half()]
    feed(small(**PATIENT), losses)


def test_reported_loss_keeps_no_graph():
    """Nothing of a loss but its value stays: activations are freed with it."""

    class Mark:
        def __call__(self, grad):
            return None

    optimizer, mark = small(**PATIENT), Mark()
    loss = torch.ones(3, requires_grad=True).exp().sum()
    loss.register_hook(mark)
    optimizer.report_loss(loss)
    reference = weakref.ref(mark)
    del loss, mark
    gc.collect()
    assert reference() is None


GARBAGE = ["0.5", None, [0.5], (0.5,), {"loss": 0.5}, True, 1j, torch.ones(2), torch.ones(0)]


def test_garbage_is_refused():
    """At once, by name, and without a trace in what is remembered."""
    losses = falling(150, 20.0, 0.05, 2)
    optimizer = small(**PATIENT)
    for garbage in (*GARBAGE, torch.tensor(1j)):
        with pytest.raises(TypeError, match=r"loss.*number"):
            optimizer.report_loss(garbage)
    assert feed(optimizer, losses) == expected_step(losses)


def test_without_a_switch_there_is_no_one_to_tell():
    optimizer = ROWS["mkor+sgd"].make(seeded())
    with pytest.raises(RuntimeError, match=r"hybrid=LossRateSwitch\(\)"):
        optimizer.report_loss(1.0)
    assert optimizer.switched_at is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_losses_that_are_not_finite_do_not_count(kind, bad):
    """A step may report one beside good ones, or nothing but one."""
    losses = falling(150, 20.0, 0.05, 3)
    with_bad = [[x, KINDS[kind](bad)] if i % 4 else [x] for i, x in enumerate(losses)]
    assert feed(small(**PATIENT), with_bad) == expected_step(losses)
    every_step = PATIENT | {"every": 1, "warmup": 0}
    optimizer = small(**every_step)
    good = [x for i, x in enumerate(losses) if i % 5]
    feed(optimizer, [KINDS[kind](bad) if i % 5 == 0 else x for i, x in enumerate(losses)])
    look = switch_look(good, LossRateSwitch(**every_step))
    assert optimizer.switched_at == look + math.ceil(look / 4)


def test_closure_counts_by_itself():
    """The run with a closure is bitwise that with ``report_loss``, switch included."""
    model, other = seeded(), seeded()
    a, b = (ROWS["mkor-h+adamw"].make(m) for m in (model, other))
    for i in range(10):

        def closure(i=i):
            a.zero_grad()
            return backward(model, i)

        a.step(closure)
    train(other, b, 10)
    assert a.switched_at == b.switched_at == STEP
    assert same(weights(model), weights(other))
    assert a.step(closure).isfinite()


def test_closure_may_return_nothing():
    model = seeded()
    optimizer = ROWS["mkor-h+adamw"].make(model)

    def closure():
        backward(model, 0)

    assert optimizer.step(closure) is None


def test_one_warning_if_no_loss_comes():
    optimizer = small(**PATIENT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(400):
            optimizer.step()
    assert len(caught) == 1
    assert "report_loss" in str(caught[0].message)
    assert "closure" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_no_warning_while_losses_come():
    """Now and then is enough; one that stops coming is missed, once."""
    optimizer = small(**PATIENT)
    for _ in range(40):
        optimizer.report_loss(1.0)
        for _ in range(20):
            optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(100):
            optimizer.step()
    assert ["no finite loss" in str(warning.message) for warning in caught] == [True]


# ------------------------------------------------------------------------------ after the switch


def test_switch_leaves_the_base_as_it_is(row):
    """Up to the switch the run is that without one; its own state stays, bitwise."""
    model, other = seeded(), seeded()
    optimizer, endless = row.make(model), row.make(other, hybrid=None)
    train(model, optimizer, STEP)
    train(other, endless, STEP)
    assert optimizer.switched_at == STEP
    assert same(weights(model), weights(other))
    assert same(base_state(optimizer), base_state(endless))
    assert not any(key.startswith(PREFIX) for e in optimizer.state.values() for key in e)
    assert optimizer.state is optimizer.base.state
    assert factors(endless)


def test_steps_after_the_switch_are_the_bases(row):
    """From the same weights and state a plain base goes the same way, bitwise."""
    model, other = seeded(), seeded(seed=1)
    optimizer = row.make(model)
    train(model, optimizer, STEP)
    base = row.base(other.parameters())
    other.load_state_dict(model.state_dict())
    base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    assert train(model, optimizer, 5, STEP) == train(other, base, 5, STEP)
    assert same(weights(model), weights(other))
    assert same(grads(model), grads(other))
    assert same(base_state(optimizer), base_state(base))


def test_nothing_of_it_is_left_on_the_model(row):
    model = seeded()
    bare = hooks(model)
    optimizer = row.make(model)
    train(model, optimizer, STEP - 1)
    assert hooks(model) > bare
    train(model, optimizer, 1, STEP - 1)
    assert hooks(model) == bare
    assert optimizer.diagnostics()["mkor/switched"] == 1
    reasons = {r.reason for r in optimizer.coverage()}
    assert not any(r.preconditioned for r in optimizer.coverage())
    assert any(f"step {STEP}" in reason for reason in reasons)


def memory():
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(storages.values())


@pytest.mark.parametrize("wrapper", [MKOR, DenseMKOR, KFAC, Eva])
def test_no_memory_of_factors(wrapper):
    """After the switch, as much memory is held as by the base alone: less than a kilobyte more."""

    def grown(hybrid):
        before = memory()
        model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 100))
        optimizer = base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if hybrid is not None:
            optimizer = wrapper(model, base, hybrid=hybrid, skip_output=False)
        for i in range(10):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 200)).square().mean()
            loss.backward()
            if hybrid is not None:
                optimizer.report_loss(i % 5)
            optimizer.step()
        del loss
        return memory() - before, optimizer

    (alone, _), (during, _) = grown(None), grown(LossRateSwitch())
    after, optimizer = grown(LossRateSwitch(warmup=0, every=1, patience=0.0))
    assert optimizer.switched_at is not None
    assert during - alone > 2000
    assert after - alone < 1000


def test_bad_steps_are_still_skipped(row):
    """``nonfinite="skip"`` goes on to hold."""
    model = seeded()
    optimizer = row.make(model, nonfinite="skip")
    train(model, optimizer, STEP)
    before = weights(model)
    optimizer.zero_grad()
    x, y = batch(40)
    nn.functional.cross_entropy(model(x * float("nan")), y).backward()
    optimizer.step()
    assert same(before, weights(model))


def test_life_goes_on_after_the_switch(row):
    """Everything that could be called before can be called after it."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, STEP)
    optimizer.zero_grad(set_to_none=False)
    with optimizer.no_capture():
        backward(model, 3)
    optimizer.report_loss(1.0)
    optimizer.step()
    assert type(optimizer).__name__ in repr(optimizer)
    optimizer.close()
    train(model, optimizer, 1)
    assert optimizer.switched_at == STEP
    row.make(model)  # without a warning: no one watches the model


def test_group_added_after_the_switch(row):
    """It is the base's; checkpoints go on to work."""
    model, other = seeded(), seeded()
    strangers = [nn.Linear(2, 2) for _ in range(2)]
    a, b = row.make(model), row.make(other)
    train(model, a, STEP)
    for optimizer, stranger in zip((a, b), strangers, strict=True):
        optimizer.add_param_group({"params": stranger.parameters(), "lr": 0.1})
    train(model, a, 1, STEP)
    other.load_state_dict(model.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.switched_at == STEP
    assert train(model, a, 3, STEP + 1) == train(other, b, 3, STEP + 1)


# ------------------------------------------------------------------------------ checkpoints


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def forgets_the_switch(optimizer, state):
    """A warning, where a switched optimizer loads a checkpoint that says nothing of the switch."""
    told = any(key.startswith(PREFIX) for entry in state["state"].values() for key in entry)
    if told or optimizer.switched_at is None:
        return nullcontext()
    return pytest.warns(UserWarning, match="says nothing of the hybrid's switch")


SAVED, LOADED = (0, 3, STEP - 1, STEP, 9), (0, 3, 9)
OTHERS = ["eva-h[step]+sgd", "sgd-momentum", "muon", "every 4"]
# One meets all; the others meet every step of either kind, those of the loading in turn.
RESUMED = [("mkor-h+adamw", saved, loaded) for saved in SAVED for loaded in LOADED] + [
    (name, saved, LOADED[(i + j) % 3])
    for i, name in enumerate(OTHERS)
    for j, saved in enumerate(SAVED)
]


@pytest.mark.parametrize(("name", "saved_at", "loaded_at"), RESUMED)
def test_resume(name, saved_at, loaded_at):
    """On either side of the switch, into an optimizer on either side: bitwise, hooks included."""
    row = HYBRIDS.get(name, HYBRIDS["mkor-h+adamw"])
    base = BASES.get(name, row.base)
    how = {"update_every": 4} if name == "every 4" else {}

    def make(model):
        return row.over(model, base(model.parameters()), **how)

    model, other = seeded(), seeded(seed=1)
    optimizer, resumed = make(model), make(other)
    train(model, optimizer, saved_at)
    train(other, resumed, loaded_at)
    optimizer.zero_grad()
    resumed.zero_grad()
    saved = through_file((model.state_dict(), optimizer.state_dict()))
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved[0])
    with forgets_the_switch(resumed, saved[1]):
        resumed.load_state_dict(saved[1])
    assert resumed.switched_at == optimizer.switched_at
    if saved_at:  # before, the output layer is still looked for, and nothing is in the state
        assert hooks(other) == hooks(model)
        assert same(factors(resumed), factors(optimizer))
    assert train(model, optimizer, 8, saved_at) == train(other, resumed, 8, saved_at)
    assert same(weights(model), weights(other))
    assert same(base_state(resumed), base_state(optimizer))
    assert resumed.switched_at == optimizer.switched_at is not None
    for key, entry in kept[1]["state"].items():
        for field, value in entry.items():
            if field.startswith(PREFIX):
                assert torch.equal(value, saved[1]["state"][key][field])


def test_switched_checkpoint_is_complete(row):
    """Its keys and shapes are those of any other; it can be saved again, and again."""
    model, other = seeded(), seeded()
    optimizer, before = row.make(model), row.make(other)
    train(model, optimizer, 9)
    train(other, before, 2)

    def shapes(state):
        return {
            key: {k: getattr(v, "shape", None) for k, v in entry.items()}
            for key, entry in state["state"].items()
        }

    first = optimizer.state_dict()
    assert shapes(first) == shapes(before.state_dict())
    assert not any(key.startswith(PREFIX) for e in optimizer.state.values() for key in e)
    resumed = row.make(seeded())
    resumed.load_state_dict(copy.deepcopy(first))
    again = resumed.state_dict()
    for key, entry in first["state"].items():
        for field, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["state"][key][field]))


def test_losses_since_the_last_look_are_kept():
    """A checkpoint between two looks continues the mean of the losses."""
    losses = falling(150, 20.0, 0.5, 4)
    whole = small(**PATIENT)
    assert feed(whole, losses) == expected_step(losses)
    for cut in (1, 14, 31):
        first, second = small(**PATIENT), small(**PATIENT)
        feed(first, losses[:cut])
        second.load_state_dict(through_file(first.state_dict()))
        assert feed(second, losses[cut:]) == whole.switched_at


def test_checkpoint_of_the_base_into_a_switched_one(row):
    """Factors and the switch start anew."""
    model, other = seeded(), seeded(seed=1)
    base, optimizer = row.base(model.parameters()), row.make(other)
    train(model, base, 2)
    train(other, optimizer, STEP)
    other.load_state_dict(model.state_dict())
    with forgets_the_switch(optimizer, base.state_dict()):
        optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    assert optimizer.switched_at is None
    assert hooks(other) > hooks(model)
    fresh = row.make(third := seeded(seed=2))
    third.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(base.state_dict()))
    for m, o in ((other, optimizer), (third, fresh)):
        o.zero_grad()
        train(m, o, 3)
    assert same(weights(other), weights(third))
    assert same(factors(optimizer), factors(fresh))


DISTRIBUTED = [(False, 0), (False, 3), (False, 9), (True, 0), (True, 3)]


@pytest.mark.parametrize(("flatten", "loaded_at"), DISTRIBUTED)
def test_distributed_checkpoint(row, flatten, loaded_at):
    """``get`` and ``set_optimizer_state_dict`` on either side of the switch."""
    # In turn: either row and each way to load meet both sides.
    first = row is HYBRIDS["mkor-h+adamw"]
    saved_at = (3, 9)[(DISTRIBUTED.index((flatten, loaded_at)) + first) % 2]
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = seeded(), seeded(seed=1)
    optimizer, resumed = row.make(model), row.make(other)
    train(model, optimizer, saved_at)
    train(other, resumed, loaded_at)
    for o in (optimizer, resumed):
        o.zero_grad()
    state = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert resumed.switched_at == optimizer.switched_at
    assert same(factors(optimizer), factors(resumed))
    assert train(model, optimizer, 8, saved_at) == train(other, resumed, 8, saved_at)
    assert same(weights(model), weights(other))
    assert resumed.switched_at == optimizer.switched_at is not None


@pytest.mark.parametrize("hybrid", ["the checkpoint", "the optimizer"])
def test_checkpoint_with_and_without_a_switch(row, hybrid):
    """Refused with a message that says what differs."""
    model, other = seeded(), seeded()
    with_switch, without = row.make(model), row.make(other, hybrid=None)
    train(model, with_switch, 2)
    train(other, without, 2)
    source, target = with_switch, without
    if hybrid == "the optimizer":
        source, target = target, source
    with pytest.raises(ValueError, match="hybrid"):
        target.load_state_dict(source.state_dict())


# ------------------------------------------------------------------------- with other options


def test_update_every_and_accumulation():
    """Switch and factors have clocks of their own; micro-batches report one by one."""
    model = seeded()
    optimizer = ROWS["mkor-h+adamw"].make(model, update_every=4)
    plain = seeded()
    twin = ROWS["mkor-h+adamw"].make(plain, update_every=4, hybrid=None)
    for i in range(STEP):
        for m, o in ((model, optimizer), (plain, twin)):
            o.zero_grad()
            for part in range(2):
                loss = backward(m, 2 * i + part)
                if o is optimizer:
                    o.report_loss(0.1 * i)  # rises: no rate is ever good
            o.step()
            del loss
        assert same(weights(model), weights(plain))
        assert (optimizer.switched_at is None) == (i < 3)
        if i == 3:
            break
    assert optimizer.switched_at == 4


@pytest.mark.slow
# The compiler itself instantiates every autograd function that it traces, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model():
    """The same moment and weights as the eager run's, and full graphs on either side."""
    torch.compiler.reset()
    model, other = seeded(), seeded()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    row = HYBRIDS["mkor-h+adamw"]
    eager = row.make(other)
    train(other, eager, STEP + 4)
    optimizer = row.make(compiled)
    train(compiled, optimizer, STEP + 4)
    assert optimizer.switched_at == eager.switched_at == STEP
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for p, q in zip(base_state(optimizer), base_state(eager), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_any_curvature():
    """The switch belongs to the wrapper, whatever the factor is."""
    factors = [name for name in ROWS if not name.startswith("mkor+")]
    for name in ("mkor+adamw", *factors):
        model = seeded(Net)
        optimizer = ROWS[name].make(model, hybrid=SWITCH)
        train(model, optimizer, 10)
        assert optimizer.switched_at is not None, name
        assert hooks(model) == 0


# -------------------------------------------------------------------------------- arguments

BAD = [
    ({"fraction": 0.0}, ValueError, "fraction.*above 0 and below 1.*0.0"),
    ({"fraction": 1.0}, ValueError, "fraction.*below 1.*1.0"),
    ({"fraction": "0.1"}, TypeError, "fraction.*number.*'0.1'"),
    ({"smoothing": 0}, ValueError, "smoothing.*above 0.*0"),
    ({"smoothing": float("nan")}, ValueError, "smoothing.*below 1.*nan"),
    ({"smoothing": None}, TypeError, "smoothing.*number.*None"),
    ({"patience": -0.1}, ValueError, "patience.*at least 0 and below 1.*-0.1"),
    ({"patience": 1}, ValueError, "patience.*below 1.*1"),
    ({"patience": True}, TypeError, "patience.*number.*True"),
    ({"warmup": -1}, ValueError, "warmup.*at least 0.*-1"),
    ({"warmup": 2.5}, TypeError, "warmup.*whole number.*2.5"),
    ({"every": 0}, ValueError, "every.*at least 1.*0"),
    ({"every": None}, TypeError, "every.*whole number.*None"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_settings(options, kind, message):
    with pytest.raises(kind, match=message):
        LossRateSwitch(**options)


@pytest.mark.parametrize("wrong", [True, 0.5, "auto", LossRateSwitch, {"fraction": 0.1}], ids=str)
def test_bad_hybrid(wrong):
    model = seeded()
    for row in ROWS.values():
        with pytest.raises(TypeError, match=r"hybrid.*LossRateSwitch\(...\) or None"):
            row.make(model, hybrid=wrong)
        assert hooks(model) == 0


def test_checkpoint_in_memory(row):
    """Loading its own live state dict, as an in-place resume does, forgets nothing."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state_dict()
    for key, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][name]))
    train(model, optimizer, 6, 3)
    assert optimizer.switched_at == STEP
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.switched_at == STEP
    train(model, optimizer, 1, 9)


def test_second_wrapper_after_the_switch(row):
    """It takes the model over, with a warning, and the first no longer touches the state."""
    model = seeded()
    first = row.make(model)
    train(model, first, 9)
    with pytest.warns(UserWarning, match="takes over"):
        second = row.over(model, first.base)
    train(model, second, 2)
    first.state_dict()
    assert any(key.startswith(PREFIX) for entry in second.state.values() for key in entry)


def test_totals_survive_the_switch(row):
    """Refused updates are counted from construction on, by whoever holds them."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 2)
    backward(model, 0)
    model.conv.weight.grad.fill_(float("nan"))
    for p in model.parameters():
        p.data.copy_(p.data)
    optimizer.step()
    for p, q in zip(model.parameters(), seeded().parameters(), strict=True):
        p.data.copy_(q.data)
    refused = optimizer.diagnostics()["mkor/refused_updates"]
    assert refused > 0
    while optimizer.switched_at is None:
        optimizer.report_loss(1.0 / (1 + optimizer.diagnostics()["mkor/steps"]))
        optimizer.step()
    assert optimizer.diagnostics()["mkor/refused_updates"] == refused
