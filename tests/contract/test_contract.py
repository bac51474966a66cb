"""What every optimizer promises: one test per promise, run for every row of ``contestants``.

Promises in which the base has no part are tested over a few bases only.
"""

import copy
import gc
import io
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

import mkor
from support.contestants import (
    BASES,
    EXCEPTIONS,
    PREFIX,
    ROWS,
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

pytestmark = pytest.mark.usefixtures("device")

F64 = torch.float64


def promised(request):
    impossible = EXCEPTIONS.get(request.param, {})
    name = request.node.originalname
    flat = request.node.callspec.params.get("flatten", False)
    for key in (name, f"{name}[flatten]" if flat else name):
        if key in impossible:
            # Strict: a base that keeps the promise after all is to be told.
            request.applymarker(pytest.mark.xfail(reason=impossible[key], strict=True))
    return ROWS[request.param]


@pytest.fixture(params=ROWS, name="row")
def _row(request):
    return promised(request)


PLAIN = {f"mkor+{name}" for name in BASES} - {"mkor+muon", "mkor+schedule-free"}


@pytest.fixture(params=[name for name in ROWS if name not in PLAIN], name="kind")
def _kind(request):
    """Rows for promises in which the base has no part: without those that differ in it alone."""
    return promised(request)


# ------------------------------------------------------------------------ it is an optimizer


def test_is_an_optimizer_that_preconditions(row):
    """The wrapper is a torch optimizer, and the promises below are made of one that does a lot."""
    model, plain = seeded(), seeded()
    optimizer, base = row.make(model), row.base(plain.parameters())
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    train(model, optimizer, 3)
    train(plain, base, 3)
    for name in ("conv.weight", "first.weight", "again.weight"):
        p, q = model.get_parameter(name), plain.get_parameter(name)
        assert (p - q).norm() > 1e-4 * q.norm(), name


def test_param_groups_and_state_are_the_bases_own(row):
    model = seeded()
    base = row.base(model.parameters())
    optimizer = row.over(model, base)
    assert optimizer.base is base
    assert optimizer.defaults == base.defaults
    for _ in range(2):
        assert all(a is b for a, b in zip(optimizer.param_groups, base.param_groups, strict=True))
        assert optimizer.state is base.state
        train(model, optimizer, 2)
        base.load_state_dict(base.state_dict())  # rebinds both


def test_learning_rate_zero_leaves_weights(row):
    model = seeded()
    optimizer = row.make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, 2)
    assert same(before, weights(model))


def test_closure(kind):
    """Runs once, first, with gradients enabled; its loss comes back."""
    model, other = seeded(), seeded()
    optimizer, expected = kind.make(model), kind.make(other)
    calls = []

    def closure():
        enabled = torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append((enabled, backward(model, len(calls))))
        return calls[-1][1]

    for i in range(4):
        with torch.no_grad():
            assert optimizer.step(closure) is calls[i][1]
    assert [enabled for enabled, _ in calls] == [True] * 4
    train(other, expected, 4)
    assert same(weights(model), weights(other))


def test_step_without_closure_returns_none(kind):
    model = seeded()
    optimizer = kind.make(model)
    backward(model, 0)
    assert optimizer.step() is None


def test_training_is_deterministic(row):
    first, second = seeded(), seeded()
    a, b = row.make(first), row.make(second)
    assert train(first, a, 5) == train(second, b, 5)
    assert same(weights(first), weights(second))
    assert same(factors(a), factors(b))


def test_hooks_on_step_run(row):
    """Pre and post hooks of the wrapper and of the base run once per step."""
    model = seeded()
    optimizer = row.make(model)
    seen = []
    for name, target in (("wrapper", optimizer), ("base", optimizer.base)):
        target.register_step_pre_hook(lambda *_, name=name: seen.append(f"{name} before"))
        target.register_step_post_hook(lambda *_, name=name: seen.append(f"{name} after"))
    train(model, optimizer, 1)
    assert seen == ["wrapper before", "base before", "base after", "wrapper after"]


def test_repr_names_wrapper(kind):
    model = seeded()
    assert type(kind.make(model)).__name__ in repr(kind.make(seeded()))


# ------------------------------------------------------------------------------ schedulers

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 8, cycle_momentum=False),
    "swa": lambda o: SWALR(o, 1e-3, anneal_epochs=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
CYCLING_MOMENTUM = {
    "cyclic-momentum": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2),
    "onecycle-momentum": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 8),
}


def test_every_scheduler_is_here():
    """Whatever torch offers, but for the one that is tied to a metric (see below)."""
    offered = {getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    offered -= {lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau}
    optimizer = torch.optim.SGD(seeded().parameters(), lr=0.1)
    assert offered <= {type(make(optimizer)) for make in SCHEDULERS.values()}


def run_schedule(model, optimizer, scheduler, steps=5):
    """What groups said before each step; without a model, of steps without gradients."""
    seen = []
    for i in range(steps):
        seen.append(
            [
                (g["lr"], g.get("momentum"), g.get("betas"), g.get("initial_lr"))
                for g in optimizer.param_groups
            ]
        )
        optimizer.zero_grad()
        if model is not None:
            backward(model, i)
        optimizer.step()
        scheduler.step()
    return seen


def scheduled():
    """Rows of each kind take schedulers in turn: every kind meets each of them, in either way."""
    for wrap in dict.fromkeys(row.wrap for row in ROWS.values()):
        rows = [name for name, row in ROWS.items() if row.wrap is wrap]
        turns = max(1, min(3, len(rows) // 2))
        for (i, row), (j, name) in itertools.product(enumerate(rows), enumerate(SCHEDULERS)):
            if (i + j) % turns == 0:
                yield row, name, "before" if (i // turns + j) % 2 else "after"


@pytest.mark.parametrize(("row_name", "name", "attached"), list(scheduled()))
def test_schedulers(row_name, name, attached):
    """Attached to the base before wrapping or to the wrapper after it, without a warning."""
    row = ROWS[row_name]
    plain, model = seeded(), seeded()
    base = row.base(plain.parameters())
    expected = run_schedule(None, base, SCHEDULERS[name](base))
    base = row.base(model.parameters())
    if attached == "before":
        scheduler = SCHEDULERS[name](base)
        optimizer = row.over(model, base)
    else:
        optimizer = row.over(model, base)
        scheduler = SCHEDULERS[name](optimizer)
    assert run_schedule(model, optimizer, scheduler) == expected


@pytest.mark.parametrize("name", CYCLING_MOMENTUM)
@pytest.mark.parametrize("row_name", ["mkor+sgd-momentum", "mkor+adamw", "mkor+nadam"])
def test_schedulers_of_momentum(row_name, name):
    """OneCycle and Cyclic look into ``defaults`` to find what to cycle."""
    row = ROWS[row_name]
    plain, model = seeded(), seeded()
    base, optimizer = row.base(plain.parameters()), row.make(model)
    expected = run_schedule(None, base, CYCLING_MOMENTUM[name](base))
    assert run_schedule(model, optimizer, CYCLING_MOMENTUM[name](optimizer)) == expected
    assert len({str(groups) for groups in expected}) > 2


def test_plateau_scheduler(kind):
    model = seeded()
    optimizer = kind.make(model)
    before = [g["lr"] for g in optimizer.param_groups]
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for i in range(3):
        train(model, optimizer, 1, i)
        scheduler.step(1.0)
    after = [g["lr"] for g in optimizer.param_groups]
    assert after == pytest.approx([lr * 0.25 for lr in before])


def test_scheduler_and_optimizer_resume_together(row):
    """The checkpoint of a run in the middle of a schedule continues it bitwise."""
    model = seeded()
    optimizer = row.make(model)
    scheduler = SCHEDULERS["onecycle"](optimizer)
    run_schedule(model, optimizer, scheduler, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    rest = run_schedule(model, optimizer, scheduler, 3)
    other = seeded(seed=1)
    resumed = row.make(other)
    again = SCHEDULERS["onecycle"](resumed)
    for part, state in zip((other, resumed, again), saved, strict=True):
        part.load_state_dict(state)
    assert run_schedule(other, resumed, again, 3) == rest
    assert same(weights(model), weights(other))


# ------------------------------------------------------------------------ passes that count


def test_accumulation_equals_the_whole_batch(row):
    """With one mean of all rows micro-batches are one batch, also unequal ones."""
    whole, parts = seeded(dtype=F64), seeded(dtype=F64)
    a, b = (row.make(m, **row.one_mean) for m in (whole, parts))
    for i, sizes in enumerate([(6, 6), (7, 3, 2), (1, 11), (6, 6), (7, 3, 2)]):
        x, y = batch(i, dtype=F64)
        a.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        a.step()
        b.zero_grad()
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            (nn.functional.cross_entropy(parts(xs), ys) * len(xs) / 12).backward()
        b.step()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


def test_clipping_sees_the_raw_gradient(row):
    """Up to ``step`` gradients are autograd's own; the clipped one is what gets preconditioned."""
    model, plain = seeded(), seeded()
    optimizer = row.make(model, rescale=None, kl_clip=None)
    backward(model, 0)
    backward(plain, 0)
    assert same(grads(model), grads(plain))
    raw_norm = clip_grad_norm_(model.parameters(), 1e-3)
    assert raw_norm == clip_grad_norm_(plain.parameters(), 1e-3)
    assert same(grads(model), grads(plain))
    unclipped = seeded()
    other = row.make(unclipped, rescale=None, kl_clip=None)
    backward(unclipped, 0)
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), unclipped.parameters(), strict=True):
        assert (p.grad * (raw_norm / 1e-3) - q.grad).norm() <= 1e-3 * q.grad.norm()


@pytest.mark.parametrize("rescale", ["step", "running"])
def test_rescaling_keeps_the_clipped_norm(row, rescale):
    """In a first step both rescalings give every layer the norm of its clipped gradient."""
    model = seeded()
    optimizer = row.make(model, rescale=rescale, kl_clip=None)
    backward(model, 0)
    clip_grad_norm_(model.parameters(), 0.01)
    before = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in model.children()]
    optimizer.step()
    after = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in model.children()]
    for b, a in zip(before, after, strict=True):
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-4)
    assert sum(not torch.equal(b, a) for b, a in zip(before, after, strict=True)) == 3


def extra_eval(model, i):
    model.eval()
    with torch.no_grad():
        model(batch(i + 50)[0])
    model.train()


def extra_inference(model, i):
    with torch.inference_mode():
        model(batch(i + 50)[0])


def extra_forward(model, i):
    model(batch(i + 50)[0]).sum()


def extra_input_gradient(model, i):
    """With every weight frozen, a gradient of the input trains nothing and counts nothing."""
    model.requires_grad_(False)
    x = batch(i + 50)[0].requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    model.requires_grad_(True)


def extras(model, i):
    for extra in (extra_eval, extra_inference, extra_forward, extra_input_gradient):
        extra(model, i)


def test_passes_that_do_not_count(kind):
    """Evaluation and forward passes without a backward leave a run bitwise as it was."""
    model, other = seeded(), seeded()
    a, b = kind.make(model), kind.make(other)
    for i in range(4):
        for m, o in ((model, a), (other, b)):
            o.zero_grad()
            x, y = batch(i)
            loss = nn.functional.cross_entropy(m(x), y)
            if m is model:
                extras(m, i)
            loss.backward()
            if m is model:
                extras(m, i)
            o.step()
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))


def test_no_capture(kind):
    """A gradient penalty inside ``no_capture`` adds to the gradients, not to the factors."""
    model, other = seeded(), seeded()
    a, b = kind.make(model), kind.make(other)
    for i in range(3):
        for m, o in ((model, a), (other, b)):
            o.zero_grad()
            if m is model:
                with o.no_capture():
                    x = batch(i + 50)[0].requires_grad_()
                    (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
                    (0.1 * g.square().sum()).backward()
                    with o.no_capture():
                        pass
                    backward(m, 70)  # the inner context has not opened the gate
                for p in m.parameters():
                    assert p.grad is not None
                    p.grad.zero_()
            backward(m, i)
            o.step()
    assert same(factors(a), factors(b))
    assert same(weights(model), weights(other))


def in_step(row, prepare):
    """Steps of two optimizers, one prepared by ``prepare(model, optimizer, i)``: the same."""
    model, other = seeded(), seeded()
    a, b = row.make(model), row.make(other)
    for i in range(3):
        prepare(model, a, i)
        b.zero_grad()
        for net, optimizer in ((model, a), (other, b)):
            backward(net, i)
            optimizer.step()
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))


def test_zero_grad_drops_captures(kind):
    """What was captured before ``zero_grad`` never reaches the factors."""

    def pass_in_vain(model, optimizer, i):
        backward(model, 90 + i)
        optimizer.zero_grad()

    in_step(kind, pass_in_vain)


@pytest.mark.parametrize("clears", ["model", "base"])
def test_gradients_cleared_without_zero_grad(kind, clears):
    """The model's ``zero_grad`` or the base's serve as well: a step drops what it has used."""

    def clear(model, optimizer, _):
        (model if clears == "model" else optimizer.base).zero_grad()

    in_step(kind, clear)


def test_zero_grad_keeps_its_argument(kind):
    model = seeded()
    optimizer = kind.make(model)
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_forward_then_zero_grad_then_backward(kind):
    """The order in which Lightning trains."""
    model, other = seeded(), seeded()
    a, b = kind.make(model), kind.make(other)
    for i in range(3):
        x, y = batch(i)
        loss = nn.functional.cross_entropy(model(x), y)
        a.zero_grad()
        loss.backward()
        a.step()
    train(other, b, 3)
    assert same(weights(model), weights(other))


def test_functional_transforms_do_not_count(kind):
    """``grad``, ``vmap`` and ``jvp`` of torch.func work on the model and leave no trace."""
    model, other = seeded(), seeded()
    a, b = kind.make(model), kind.make(other)
    x, y = batch(80)
    for i in range(3):
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(p, xs, ys):
            out = torch.func.functional_call(model, p, (xs[None],))
            return nn.functional.cross_entropy(out, ys[None])

        expected = torch.func.grad(loss)(parameters, x[0], y[0])
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
        torch.testing.assert_close(each["first.weight"][0], expected["first.weight"])
        with warnings.catch_warnings():  # torch's own forward mode uses what torch deprecates
            warnings.simplefilter("ignore")
            torch.func.jvp(lambda p: loss(p, x[0], y[0]), (parameters,), (parameters,))
        train(model, a, 1, i)
    train(other, b, 3)
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))


class Checkpointed(Net):
    """``Net`` with its middle under activation checkpointing."""

    mode: bool | None = None

    def forward(self, x):
        x = self.first(self.conv(x).relu().flatten(1))
        middle = lambda h: self.again(self.again(self.norm(h)).tanh()).tanh()  # noqa: E731
        if self.mode is None:
            return self.output(middle(x))
        return self.output(torch.utils.checkpoint.checkpoint(middle, x, use_reentrant=self.mode))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(kind, reentrant):
    """Recomputed layers count once: the run equals the one without checkpointing."""
    model, other = seeded(Checkpointed), seeded(Checkpointed)
    model.mode = reentrant
    a, b = (kind.make(m, **kind.one_mean) for m in (model, other))
    train(model, a, 4)
    train(other, b, 4)
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(factors(a), factors(b), strict=True):
        torch.testing.assert_close(p, q)


def test_in_place_activation(kind):
    """An in-place activation after a layer changes nothing of what is captured."""
    make = lambda inplace: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(inplace),
        nn.Linear(6, 3),
    )  # fmt: skip
    model, other = seeded(make, inplace=True), seeded(make, inplace=False)
    a, b = kind.make(model), kind.make(other)
    assert train(model, a, 4) == train(other, b, 4)
    assert same(weights(model), weights(other))


# ------------------------------------------------------------------------ copies of the model


def test_copy_of_the_model_is_free(kind):
    """EMA and SWA copy the model: the copy runs, feeds no factor and holds no optimizer."""
    model, other = seeded(), seeded()
    a, b = kind.make(model), kind.make(other)
    average = AveragedModel(model)
    for i in range(3):
        train(model, a, 1, i)
        average.update_parameters(model)
        clone = copy.deepcopy(model)
        a.zero_grad()
        b.zero_grad()
        backward(clone, 60)
        average(batch(3)[0]).sum().backward()
        train(other, b, 1, i)
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))
    reference = weakref.ref(a)
    del a
    gc.collect()
    assert reference() is None
    assert clone(batch(0)[0]).shape == (12, 3)


def test_model_pickles(kind):
    """As with ``torch.save(model)``; the loaded model trains with an optimizer of its own."""
    model = seeded()
    optimizer = kind.make(model)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert same(weights(model), weights(loaded))
        before = factors(optimizer)
        train(loaded, kind.make(loaded), 2)
        assert same(before, factors(optimizer))


def test_copy_of_the_optimizer_is_refused(kind):
    """Hooks belong to one model: the message says what to do instead."""
    optimizer = kind.make(seeded())
    for copier in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copier(optimizer)


# ------------------------------------------------------------------------------- parameters


class TwoPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()
        self.extra = nn.Linear(16, 8)

    def forward(self, x):
        body = self.body
        h = body.first(body.conv(x).relu().flatten(1)) + self.extra(x.flatten(1))
        return body.output(body.again(body.norm(h)))


def test_add_param_group(row):
    """Parameters that come later are trained and their layers preconditioned."""
    model, other = seeded(TwoPart), seeded(TwoPart)
    parts = [[*m.body.parameters()] for m in (model, other)]
    a = row.make(model, parts[0])
    before = weights(model.extra)
    train(model, a, 2)
    assert same(before, weights(model.extra))
    old = factors(a)
    a.add_param_group({"params": list(model.extra.parameters()), "lr": 0.001})
    assert a.base.param_groups[-1]["lr"] == 0.001
    assert a.param_groups[-1] is a.base.param_groups[-1]
    assert same(old, [f for f, _ in zip(factors(a), old, strict=False)])
    a.zero_grad()
    backward(model, 7)
    raw = model.extra.weight.grad.clone()
    a.step()
    assert not same(before, weights(model.extra))
    if a.update_every == 1:
        assert not torch.equal(raw, model.extra.weight.grad)
    b = row.make(other, parts[1])
    b.add_param_group({"params": list(other.extra.parameters()), "lr": 0.001})
    saved = copy.deepcopy((model.state_dict(), a.state_dict()))
    other.load_state_dict(saved[0])
    b.load_state_dict(saved[1])
    train(model, a, 3, 20)
    train(other, b, 3, 20)
    assert same(weights(model), weights(other))


def test_frozen_layer(kind):
    """A layer frozen after wrapping stays as it is, breaks nothing, and can thaw."""
    model = seeded()
    optimizer = kind.make(model)
    train(model, optimizer, 2)
    model.first.requires_grad_(False)
    before = weights(model.first)
    optimizer.zero_grad()
    train(model, optimizer, 2, 2)
    assert same(before, weights(model.first))
    model.first.requires_grad_(True)
    train(model, optimizer, 4, 4)
    assert not same(before, weights(model.first))


def test_frozen_from_the_start(kind):
    model = seeded()
    model.conv.requires_grad_(False)
    before = weights(model.conv)
    optimizer = kind.make(model)
    train(model, optimizer, 3)
    assert same(before, weights(model.conv))
    reasons = {r.parameter: r.reason for r in optimizer.coverage() if not r.preconditioned}
    assert "frozen" in reasons["conv.weight"]


def test_frozen_weight_with_a_training_bias(kind):
    """The bias alone goes to the base, raw."""
    model = seeded()
    model.first.weight.requires_grad_(False)
    optimizer = kind.make(model)
    backward(model, 0)
    raw = model.first.bias.grad.clone()
    optimizer.step()
    assert torch.equal(raw, model.first.bias.grad)


def test_unused_layer(kind):
    """A layer that the loss never meets keeps its weights and gets no gradient."""
    model = seeded(TwoPart)
    model.unused = nn.Linear(5, 5)
    optimizer = kind.make(model)
    before = weights(model.unused)
    losses = train(model, optimizer, 3)
    assert same(before, weights(model.unused))
    assert model.unused.weight.grad is None
    assert all(torch.tensor(losses).isfinite())
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    train(model, optimizer, 1, 3)


def test_base_with_parameters_from_elsewhere(row):
    """A learned temperature or loss weight outside the model is trained by the base alone."""
    model = seeded()
    stranger = nn.Parameter(torch.ones(4))
    optimizer = row.make(model, [*model.parameters(), stranger])
    optimizer.zero_grad()
    backward(model, 0)
    (stranger * torch.arange(4.0)).sum().backward()
    optimizer.step()
    assert torch.equal(stranger.grad, torch.arange(4.0))
    assert not torch.equal(stranger, torch.ones(4))
    optimizer.load_state_dict(optimizer.state_dict())


def test_options_per_group(row):
    """Groups keep their own options; a frozen learning rate freezes."""
    model = seeded()
    rest = [*model.first.parameters(), *model.norm.parameters(), *model.again.parameters()]
    groups = [
        {"params": list(model.conv.parameters()), "lr": 0.0},
        {"params": rest + list(model.output.parameters())},
    ]
    before, other = weights(model.conv), weights(model.first)
    train(model, row.make(model, groups), 2)
    assert same(before, weights(model.conv))
    assert not same(other, weights(model.first))


# ------------------------------------------------------------------------------ checkpoints


def saved_to_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_resume(row, steps):
    """A new model and optimizer, loaded, continue bitwise, before and after the window is full."""
    model, other = seeded(), seeded(seed=1)
    optimizer = row.make(model)
    train(model, optimizer, steps)
    weights_saved, state = copy.deepcopy(model.state_dict()), saved_to_file(optimizer)
    assert set(state) == {"state", "param_groups"}
    expected = train(model, optimizer, 7, steps)
    other.load_state_dict(weights_saved)
    resumed = row.make(other)
    resumed.load_state_dict(state)
    assert train(other, resumed, 7, steps) == expected
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(resumed))
    assert same(base_state(optimizer), base_state(resumed))


def test_load_goes_back_in_time(kind):
    """Loading into an optimizer in use replaces all of its state, captures included."""
    model = seeded()
    optimizer = kind.make(model)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 4, 3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(model, optimizer, 4, 3) == expected


def test_loaded_checkpoint_is_not_aliased(kind):
    """Training on does not change the state dict that was loaded."""
    model = seeded()
    optimizer = kind.make(model)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(model, optimizer, 3, 3)
    for key, entry in kept["state"].items():
        for name, value in entry.items():
            if name.startswith(PREFIX):  # torch's own optimizers do take over what they load
                assert torch.equal(value, state["state"][key][name])


def test_checkpoint_of_the_base_alone(row):
    """A run without mkor goes on with it: the base's state is kept, factors start anew."""
    model = seeded()
    base = row.base(model.parameters())
    train(model, base, 3)
    state = copy.deepcopy(base.state_dict())
    other = seeded()
    other.load_state_dict(model.state_dict())
    optimizer = row.make(other)
    optimizer.load_state_dict(state)
    assert same(base_state(base), base_state(optimizer))
    assert torch.tensor(train(other, optimizer, 3)).isfinite().all()


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint(row, flatten):
    """``get`` and ``set_optimizer_state_dict``, by names, into an optimizer that never stepped."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = seeded(), seeded(seed=1)
    optimizer = row.make(model)
    train(model, optimizer, 3)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    file = io.BytesIO()
    torch.save((model.state_dict(), state), file)
    expected = train(model, optimizer, 4, 3)
    file.seek(0)
    model_state, state = torch.load(file, weights_only=True)
    other.load_state_dict(model_state)
    resumed = row.make(other)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert train(other, resumed, 4, 3) == expected
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(resumed))


def test_state_holds_the_factors(row):
    """``optimizer.state[weight]`` contains them, from one step with zero gradients on."""
    model = seeded()
    optimizer = row.make(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    at_first = {
        name: {k: v.shape for k, v in optimizer.state[p].items() if k.startswith(PREFIX)}
        for name, p in model.named_parameters()
    }
    for name in ("conv.weight", "first.weight", "again.weight", "output.weight"):
        assert len(at_first[name]) > 1, name
    assert all(optimizer.state[p] for p in model.parameters())
    train(model, optimizer, 4)
    for name, p in model.named_parameters():
        entry = {k: v.shape for k, v in optimizer.state[p].items() if k.startswith(PREFIX)}
        assert entry == at_first[name]


def untouched(factor):
    """Empty, an identity, a factor of 1, or what is known of the outputs."""
    if factor.dim() == 2 and factor.shape[0] == factor.shape[1]:
        factor = factor - torch.eye(len(factor), dtype=factor.dtype) * factor.any()
    return (factor == 0).all() or factor.dim() == 0


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_step_without_a_backward_is_harmless(row, gradient):
    """Tools take one with no or with zero gradients to make state: nothing else moves."""
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # else weight decay would move weights
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    before = weights(model)
    optimizer.step()
    assert same(before, weights(model))
    assert all(untouched(f) for f in factors(optimizer))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    train(other, expected, 1)
    for start in range(optimizer.update_every):  # the empty step may have been an update's turn
        assert torch.tensor(train(model, optimizer, 1)).isfinite().all(), start
    for p, q in zip(grads(model), grads(other), strict=True):
        assert p.isfinite().all()
        # The empty step was the turn of the first rows, or of the first inversion.
        every = getattr(optimizer.curvature, "inverse_every", 1)
        if optimizer.update_every == every == 1 and optimizer.curvature.rows is None:
            assert torch.equal(p, q)


def test_state_dict_before_any_step(row):
    """Accelerate saves and loads at once."""
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    optimizer.load_state_dict(optimizer.state_dict())
    assert train(model, optimizer, 4) == train(other, expected, 4)


def floating(optimizer):
    return {f.dtype for f in factors(optimizer) if f.is_floating_point()}


def test_bfloat16_model_keeps_its_factors_wide(row):
    """Factors of a bfloat16 model are float32, and a load does not change that."""
    wide = row.defaults.get("factor_dtype") or torch.float32
    model, other = (seeded(dtype=torch.bfloat16) for _ in range(2))
    optimizer, resumed = row.make(model), row.make(other)
    train(model, optimizer, 3)
    state = saved_to_file(optimizer)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert same(factors(optimizer), factors(resumed))
    for o in (optimizer, resumed):
        assert wide in floating(o) <= {torch.float32, wide}
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 1, 3)
    assert same(grads(model), grads(other))
    assert same(factors(optimizer), factors(resumed))


def test_float64_stays_float64(row):
    model = seeded(dtype=F64)
    optimizer = row.make(model)
    train(model, optimizer, 2)
    wide = row.defaults.get("factor_dtype") or F64
    assert wide in floating(optimizer) <= {F64, wide}


# ---------------------------------------------------------------------------- its life cycle


def test_close(row):
    """Hooks come off, factors go, and the base continues as if it had always been alone."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 3)
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 0
    assert factors(optimizer) == []
    assert all(entry for entry in optimizer.base.state.values())
    other = seeded()
    other.load_state_dict(model.state_dict())
    base = row.base(other.parameters())
    base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    half = train(model, optimizer, 2, 3) + train(model, optimizer.base, 2, 5)
    assert half == train(other, base, 4, 3)
    assert same(weights(model), weights(other))
    optimizer.load_state_dict(optimizer.state_dict())


def test_closing_drops_captures(row):
    """A backward pass between ``close`` and ``step`` reaches the base untouched."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 2)
    backward(model, 5)
    optimizer.close()
    raw = grads(model)
    optimizer.step()
    assert same(raw, grads(model))


def test_second_wrapper_closes_the_first(kind):
    """Rerunning a notebook cell stacks nothing."""
    model, other = seeded(), seeded()
    first = kind.make(model)
    count = hooks(model)
    with pytest.warns(UserWarning, match="closed"):
        second = kind.make(model)
    assert hooks(model) == count
    assert train(model, second, 3) == train(other, kind.make(other), 3)
    assert factors(first) == []


def test_second_wrapper_over_the_same_base(kind):
    """The new wrapper takes over the base that the old one has just let go."""
    model = seeded()
    base = kind.base(model.parameters())
    first = kind.over(model, base)
    train(model, first, 2)
    with pytest.warns(UserWarning, match="closed"):
        second = kind.over(model, base)
    train(model, second, 2, 2)
    assert second.diagnostics()["mkor/steps"] == 2


def test_nothing_keeps_the_optimizer_alive(kind):
    """Hooks hold it weakly: deleting it takes them off, and the base is left clean."""
    model = seeded()
    base = kind.base(model.parameters())
    optimizer = kind.over(model, base)
    train(model, optimizer, 2)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert hooks(model) == 0
    train(model, base, 2, 2)


def test_wrapper_does_not_outlive_its_model():
    """The pair of model and optimizer is freed together."""
    model = seeded()
    optimizer = ROWS["mkor+adamw"].make(model)
    train(model, optimizer, 2)
    references = [weakref.ref(o) for o in (model, optimizer, model.first)]
    del model, optimizer
    gc.collect()
    assert [r() for r in references] == [None] * 3


# ---------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["dense[paper]+sgd", "kfac+sgd-momentum", "eva+adamw"])
def test_hooks_that_come_after_the_first_compiled_call(name):
    """Compiled code ignores them: an error says so, and what to do; see ``test_compile``."""
    model = seeded()
    gc.collect()  # wrappers of other tests may keep compiled code from running
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    # As in a process that has no wrapper yet, compiled code does not look for new hooks.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        backward(compiled, 0)
    optimizer = ROWS[name].make(compiled, skip_output=False)
    with pytest.raises(RuntimeError, match="before the first call of a compiled model"):
        train(compiled, optimizer, 100)
    torch.compiler.reset()


# ------------------------------------------------------------------------------------ scaler


def test_grad_scaler(row):
    """A constant scale cancels in the window, the others are told; an overflow reaches nothing."""
    model, other = seeded(), seeded()
    optimizer, plain = row.make(model), row.make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    if row.wrap is not mkor.MKOR:
        optimizer.loss_scale = scaler.get_scale()
    for i in range(4):
        optimizer.zero_grad()
        x, y = batch(i)
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 1:  # an overflow: the scaler skips the step
            optimizer.zero_grad()
            before = (weights(model), factors(optimizer))
            (nn.functional.cross_entropy(model(x), y) * float("inf")).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(1024.0)
            assert same(before[0], weights(model))
            assert same(before[1], factors(optimizer))
    train(other, plain, 4)
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
