"""Mixed and low precision, loss scales and overflows, accumulation without synchronisation."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.contestants import (
    PREFIX,
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
    "mkor+adamw",
    "mkor+sgd-momentum",
    "mkor[left,step]+adamw",
    "mkor[bfloat16]+adamw",
    "mkor+adamw-8bit",
    "dense[paper]+sgd",
    "dense[exact]+adamw",
    "dense[release,float16]+adamw",
    "dense[every 3]+sgd-momentum",
    "kfac+sgd-momentum",
    "kfac[pi,running]+adamw",
    "eva+adamw",
]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=CHOSEN, name="row")
def _row(request):
    return ROWS[request.param]


def in_turn(name, values):
    """Rows take two values in turn; every kind of curvature meets both, Eva's one row too."""
    pairs = [(row, v) for row in CHOSEN for v in values]
    kept = [
        pytest.param(ROWS[row], v, id=f"{row}-{v}")
        for row, v in pairs
        if (CHOSEN.index(row) + values.index(v)) % 2 == 0 or row == "eva+adamw"
    ]
    return pytest.mark.parametrize(("row", name), kept)


def cosine(first, second):
    first, second = (torch.cat([t.double().flatten() for t in ts]) for ts in (first, second))
    return (first @ second / (first.norm() * second.norm())).item()


# -------------------------------------------------------------------------------- autocast


def train_mixed(model, optimizer, dtype, inside="forward", steps=4):
    """Autocast around the forward pass, around the backward too, or around the whole step."""
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        x, y = batch(i)
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(x), y)
            if inside != "forward":
                loss.backward()
            if inside == "step":
                optimizer.step()
        if inside == "forward":
            loss.backward()
        if inside != "step":
            optimizer.step()
        losses.append(loss.item())
    return losses


@in_turn("dtype", HALVES)
def test_autocast(row, dtype):
    """The first preconditioned gradient is that of float32, but for rounding; factors stay wide."""
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    train_mixed(model, optimizer, dtype, steps=1)
    train(other, expected, 1)
    assert 0.99 < cosine(grads(model), grads(other)) < 1 - 1e-9
    train_mixed(model, optimizer, dtype, steps=5)
    wide = row.defaults.get("factor_dtype") or torch.float32
    kept = {f.dtype for f in factors(optimizer) if f.is_floating_point()}
    assert wide in kept <= {torch.float32, wide}
    assert all(f.float().isfinite().all() for f in factors(optimizer))
    assert optimizer.diagnostics()["mkor/raw_gradients"] == 0


@pytest.mark.parametrize("inside", ["backward", "step"])
def test_autocast_around_more_than_the_forward_pass(row, inside):
    """Backward passes and steps taken inside it, as in a manual loop, compute the same bitwise."""
    # In turn: every row meets both, and so do both ways.
    dtype = HALVES[([ROWS[name] for name in CHOSEN].index(row) + (inside == "step")) % 2]
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    losses = train_mixed(model, optimizer, dtype, inside)
    assert losses == train_mixed(other, expected, dtype)
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(expected))


@in_turn("dtype", HALVES)
def test_low_precision_weights(row, dtype):
    """A model of half-precision weights: the preconditioned gradient keeps its direction."""
    model, other = seeded(dtype=dtype), seeded()
    other.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    optimizer, expected = row.make(model), row.make(other)
    backward(model, 0)
    backward(other, 0)
    raw = cosine(grads(model), grads(other))
    optimizer.step()
    expected.step()
    assert {g.dtype for g in grads(model)} == {dtype}
    assert cosine(grads(model), grads(other)) > raw - 0.02 > 0.9
    wide = row.defaults.get("factor_dtype") or torch.float32
    kept = {f.dtype for f in factors(optimizer) if f.is_floating_point()}
    assert wide in kept <= {torch.float32, wide}


# ------------------------------------------------------------------------------ gradient scaler


def train_scaled(model, optimizer, scaler, batches, *, tell=True, mixed=None):
    """An ordinary loop with a scaler; returns the batches of the steps that were taken."""
    taken = []
    for i in batches:
        optimizer.zero_grad()
        x, y = batch(i)
        with torch.autocast("cpu", mixed) if mixed else nullcontext():
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if tell:
            optimizer.loss_scale = scaler.get_scale()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            taken.append(i)
    return taken


def test_overflows_leave_no_trace(row):
    """Real ones, in float16, before the first step and between others: the run without them."""
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    # 2^26 overflows, 2^8 does not; two steps without an overflow lead from one to the other.
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**26, backoff_factor=2.0**-18, growth_factor=2.0**18, growth_interval=2
    )
    taken = train_scaled(model, optimizer, scaler, range(9), mixed=torch.float16)
    assert taken == [1, 2, 4, 5, 7, 8]
    calm = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    assert train_scaled(other, expected, calm, taken, mixed=torch.float16) == taken
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(expected))
    assert same(base_state(optimizer), base_state(expected))
    assert optimizer.diagnostics()["mkor/refused_updates"] == 0


@in_turn("as_tensor", [False, True])
def test_told_scale_is_removed(row, as_tensor):
    """``loss_scale`` takes a scale that changes in every step out of what is learned, exactly."""
    model, other = seeded(), seeded()
    optimizer, expected = row.make(model), row.make(other)
    for i in range(5):
        scale = 2.0 ** (3 * i)
        optimizer.loss_scale = torch.tensor(scale) if as_tensor else scale
        optimizer.zero_grad()
        x, y = batch(i)
        (cross_entropy(model(x), y) * scale).backward()
        for p in model.parameters():
            p.grad /= scale
        optimizer.step()
    train(other, expected, 5)
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(expected))


def scaled_pair(row, scale, tell, steps=5):
    """A run with a constant scale, told or not, and one without."""
    model, other = seeded(), seeded()
    optimizer, plain = row.make(model), row.make(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    train_scaled(model, optimizer, scaler, range(steps), tell=tell)
    train(other, plain, steps)
    return (model, optimizer), (other, plain)


@pytest.mark.parametrize("name", [n for n in CHOSEN if n.startswith("mkor")])
def test_window_needs_no_word_of_a_constant_scale(name):
    """Both the vectors and what damps them grow with it: the preconditioner is bitwise the same."""
    (model, optimizer), (other, plain) = scaled_pair(ROWS[name], 2.0**10, tell=False)
    assert same(weights(model), weights(other))
    entry, expected = (o.state[m.first.weight] for m, o in ((model, optimizer), (other, plain)))
    vectors, square = PREFIX + "left_rows", PREFIX + "left_mean_square"
    assert torch.equal(entry[vectors], expected[vectors] * 2.0**10)
    assert torch.equal(entry[square], expected[square] * 2.0**20)
    assert expected[vectors].any()


RIGHT = [name for name in CHOSEN if ROWS[name].defaults.get("sides") == "right"]
TOLD = [name for name in CHOSEN if not name.startswith("mkor") and name not in RIGHT]


@pytest.mark.parametrize("name", TOLD)
def test_others_must_be_told_of_the_scale(name):
    """Their damping, or the identity they start from, has a scale of its own."""
    (model, _), (other, _) = scaled_pair(ROWS[name], 2.0**10, tell=True)
    assert same(weights(model), weights(other))
    (model, _), (other, _) = scaled_pair(ROWS[name], 2.0**10, tell=False)
    assert not same(weights(model), weights(other))


@pytest.mark.parametrize("name", RIGHT)
def test_inputs_have_no_scale(name):
    """With the right side alone there is nothing to tell."""
    (model, _), (other, _) = scaled_pair(ROWS[name], 2.0**10, tell=False)
    assert same(weights(model), weights(other))


# -------------------------------------------------------------- accumulation under DDP's no_sync


@pytest.fixture(name="one_process")
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@in_turn("wrapped", ["before DDP", "after DDP"])
def test_accumulation_without_synchronisation(row, wrapped):
    """Micro-batches inside ``no_sync`` count like those outside, under DDP as without it."""
    model, other = seeded(), seeded()
    parallel = DistributedDataParallel(model)
    optimizer = row.make(parallel if wrapped == "after DDP" else model)
    expected = row.make(other)
    for i in range(4):
        for net, o in ((parallel, optimizer), (other, expected)):
            o.zero_grad()
            for part in range(3):
                quiet = net.no_sync() if net is parallel and part < 2 else nullcontext()
                with quiet:
                    x, y = batch(3 * i + part)
                    (cross_entropy(net(x), y) / 3).backward()
            o.step()
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(expected))


# -------------------------------------------------------------------- several of these at once


class Checkpointed(nn.Module):
    """Two halves under activation checkpointing."""

    def __init__(self):
        super().__init__()
        self.net = seeded()
        self.reentrant = None

    def forward(self, x):
        net = self.net
        first = lambda x: net.first(net.conv(x).relu().flatten(1))  # noqa: E731
        second = lambda x: net.again(net.norm(x)).tanh()  # noqa: E731
        for part in (first, second):
            if self.reentrant is None:
                x = part(x)
            else:
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=self.reentrant)
        return net.output(x)


@in_turn("reentrant", [True, False])
def test_checkpointing_accumulation_autocast_and_a_penalty(row, reentrant):
    """Together they count what each alone counts."""
    model, other = Checkpointed(), Checkpointed()
    model.reentrant = reentrant
    optimizer, expected = row.make(model), row.make(other)
    average = torch.optim.swa_utils.AveragedModel(model)
    for i in range(3):
        for net, o in ((model, optimizer), (other, expected)):
            o.zero_grad()
            for part in range(2):
                x, y = batch(2 * i + part)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = cross_entropy(net(x.requires_grad_()), y)
                loss.backward()
                with o.no_capture():
                    x = x.detach().requires_grad_()
                    (g,) = torch.autograd.grad(net.net(x).sum(), x, create_graph=True)
                    (0.1 * g.square().sum()).backward()
            o.step()
        average.update_parameters(model)
    assert same(weights(model), weights(other))
    assert same(factors(optimizer), factors(expected))
    clone = copy.deepcopy(model)
    assert same(weights(clone), weights(model))


def test_hybrid_under_a_scaler():
    """A scaled loss that is reported divided by the scale counts like any other."""
    model = seeded()
    switch = mkor.LossRateSwitch(every=1000)
    optimizer = ROWS["mkor+sgd"].make(model, hybrid=switch)
    x, y = batch(0)
    loss = cross_entropy(model(x), y)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(loss).backward()
    optimizer.report_loss(loss)
    scaler.step(optimizer)
    total, count = optimizer.state[model.first.weight][PREFIX + "losses"].tolist()
    assert (total, count) == (pytest.approx(loss.item()), 1)
