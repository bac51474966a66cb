"""Whole steps as CUDA graphs repeat them, emulated on a CPU: ``graph.py`` says how."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

import mkor
from contestants import base_state, batch, factors, seeded, weights
from graph import READS, Graph, Operators, forbidden
from mkor.memo import memo
from mkor.watch import PATIENCE

F64 = torch.float64
ROWS, WARMUP, REPLAYS = 24, 3, 6
WINDOW = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9, "damping": 0.05}
KINDS = {
    "window": (mkor.MKOR, WINDOW),
    "all rows": (mkor.MKOR, WINDOW | {"rows": None}),
    "clipped": (mkor.MKOR, WINDOW | {"rescale": None, "kl_clip": 1e-3}),
    "dense": (mkor.DenseMKOR, {"vectors": 2, "rows": 3, "update_every": 1}),
    "kfac": (mkor.KFAC, {"damping": 0.1}),
    "eva": (mkor.Eva, {"damping": 0.1}),
}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "rate as a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
}


class Own(nn.Linear):
    """Its input is summed as it comes: autograd may keep another."""

    def forward(self, x):
        return super().forward(x + 1)


class Net(nn.Module):
    """Lines of images, small layers of one shape, one of them used twice, and tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.strided = nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 0))
        self.first, self.second = nn.Linear(20, 8), nn.Linear(8, 8)
        self.third = Own(8, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.interpolate(x, size=(16, 10))
        x = self.strided(self.conv(x).tanh()).tanh()  # [n, 4, 9, 5]
        x = self.first(x.movedim(2, 1).flatten(2)).tanh()  # [n, 9, 8]
        return self.output(self.second(self.third(self.second(x).tanh())).tanh().mean(1))


class Attention(nn.Module):
    """Products that no hook of a module sees."""

    def __init__(self):
        super().__init__()
        self.first, self.output = nn.Linear(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x.flatten(1, 2)).tanh()
        return self.output(self.attention(x, x, x, need_weights=False)[0].tanh().mean(1))


@pytest.fixture
def graph(as_on_a_gpu):
    return Graph()


def make(kind="window", base="momentum", net=Net, **how):
    model = seeded(net).to(F64)
    wrapper, options = KINDS[kind]
    return model, wrapper(model, BASES[base](model.parameters()), **(options | how))


def passes(model, x, y, micro=1):
    for some, label in zip(x.chunk(micro), y.chunk(micro), strict=True):
        (nn.functional.cross_entropy(model(some), label) / micro).backward()


def eager(model, optimizer, steps, micro=1):
    for i in steps:
        optimizer.zero_grad()
        passes(model, *batch(i, ROWS, F64), micro)
        optimizer.step()


def captured(graph, monkeypatch, model, optimizer, micro=1):
    """Torch's recipe: some steps, no gradients, then one step on tensors that stay."""
    eager(model, optimizer, range(WARMUP), micro)
    optimizer.zero_grad(set_to_none=True)
    fixed = batch(0, ROWS, F64)
    with graph.capture(monkeypatch):
        passes(model, *fixed, micro)
        optimizer.step()
    return fixed


def replay(graph, fixed, steps):
    for i in steps:
        for into, new in zip(fixed, batch(i, ROWS, F64), strict=True):
            into.copy_(new)
        graph.replay()


def load(into, saved):
    for new, old in zip(into, saved, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))


def check(one, two):
    """Two models with their optimizers are at the same point."""
    for read in (weights, lambda m: [p.grad for p in m.parameters()]):
        compare(read(one[0]), read(two[0]))
    compare(factors(one[1]), factors(two[1]))
    compare(base_state(one[1]), base_state(two[1]))
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        mine, other = one[1].state[a]["mkor_counters"], two[1].state[b]["mkor_counters"]
        assert mine.tolist() == other.tolist()


def compare(found, expected):
    assert len(found) == len(expected) > 0 or not expected
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def both(graph, monkeypatch, micro=1, **how):
    """A run of replays, and its twin's of eager steps."""
    one, two = make(**how), make(**how)
    fixed = captured(graph, monkeypatch, *one, micro)
    replay(graph, fixed, range(WARMUP, WARMUP + REPLAYS))
    eager(*two, range(WARMUP + REPLAYS), micro)
    return one, two, fixed


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_eager_steps(kind, micro, graph, monkeypatch):
    """Of every curvature, with rows and lines that move, and two micro-batches in the graph."""
    one, two, _ = both(graph, monkeypatch, micro, kind=kind)
    check(one, two)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["window", "clipped"])
def test_bases(kind, base, graph, monkeypatch):
    one, two, _ = both(graph, monkeypatch, kind=kind, base=base)
    check(one, two)


def test_attention(graph, monkeypatch):
    one, two, _ = both(graph, monkeypatch, net=Attention)
    check(one, two)
    assert "mkor_updates" in one[1].state[one[0].attention.in_proj_weight]


def test_a_rate_that_is_a_tensor_may_change(graph, monkeypatch):
    """Base and clip read it in every replay."""
    one, two = (make("clipped", "rate as a tensor") for _ in range(2))
    fixed = captured(graph, monkeypatch, *one)
    eager(*two, range(WARMUP))
    for i, rate in enumerate((0.05, 0.4, 0.01), WARMUP):
        for _, optimizer in (one, two):
            optimizer.param_groups[0]["lr"].fill_(rate)
        replay(graph, fixed, [i])
        eager(*two, [i])
    check(one, two)


def test_capturing_takes_no_step(graph, monkeypatch):
    one, two = make(), make()
    captured(graph, monkeypatch, *one)
    eager(*two, range(WARMUP))
    one[0].zero_grad()
    two[0].zero_grad()
    check(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_steps_after_replays(kind, graph, monkeypatch):
    """They use the rows whose turn it is, count on, and replays go on after them."""
    one, two, fixed = both(graph, monkeypatch, kind=kind)
    for step in range(WARMUP + REPLAYS, WARMUP + REPLAYS + 6, 2):
        kept = [p.grad for p in one[0].parameters()]
        for model, optimizer in (one, two):
            eager(model, optimizer, [step])
        check(one, two)
        for p, gradient in zip(one[0].parameters(), kept, strict=True):
            p.grad = gradient
        replay(graph, fixed, [step + 1])
        eager(*two, [step + 1])
    check(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_diagnostics_and_checkpoints_after_replays(kind, graph, monkeypatch):
    one, two, fixed = both(graph, monkeypatch, kind=kind)
    counters = one[1].base.state_dict()["state"][0]["mkor_counters"]
    assert counters.tolist() == [1, WARMUP + REPLAYS, WARMUP + REPLAYS, 1]
    assert one[1].diagnostics() == pytest.approx(two[1].diagnostics(), rel=1e-6)
    assert one[1].diagnostics()["mkor/steps"] == WARMUP + REPLAYS
    replay(graph, fixed, range(20, 22))
    resumed = make(kind)
    load(resumed, one)
    eager(*one, range(22, 26))
    eager(*resumed, range(22, 26))
    check(one, resumed)
    assert resumed[1].diagnostics()["mkor/updates"] == WARMUP + REPLAYS + 6


def test_counters_of_a_checkpoint_with_more_steps_than_updates(graph, monkeypatch):
    saved = make(update_every=3)
    eager(*saved, range(5))
    one, two = make(), make()
    for new in (one, two):
        load(new, saved)
    fixed = captured(graph, monkeypatch, *one)
    replay(graph, fixed, range(WARMUP, 5))
    eager(*two, range(5))
    check(one, two)
    assert one[1].diagnostics()["mkor/steps"] == 10
    assert one[1].diagnostics()["mkor/updates"] == 7


def test_loading_ends_the_captured_state(graph, monkeypatch):
    """The host leads again, and a new graph can be captured."""
    one, two, _ = both(graph, monkeypatch)
    saved = make()
    eager(*saved, range(2))
    for old in (one, two):
        load(old, saved)
    again = Graph()
    fixed = captured(again, monkeypatch, *one)
    replay(again, fixed, range(WARMUP, 6))
    eager(*two, range(6))
    check(one, two)


def test_new_group_after_replays(graph, monkeypatch):
    """Counters come along; a new graph can be captured after a step."""

    def make_partly():
        model = seeded(Net).to(F64)
        base = BASES["momentum"](model.conv.parameters())
        base.add_param_group({"params": model.first.parameters()})
        return model, mkor.MKOR(model, base, **WINDOW)

    one, two = make_partly(), make_partly()
    fixed = captured(graph, monkeypatch, *one)
    replay(graph, fixed, range(WARMUP, 6))
    eager(*two, range(6))
    for model, optimizer in (one, two):
        optimizer.add_param_group({"params": model.second.parameters()})
        eager(model, optimizer, range(6, 9))
    compare(weights(one[0]), weights(two[0]))
    assert one[1].diagnostics()["mkor/steps"] == 9


def test_cosines_are_measured_if_they_were_when_captured(graph, monkeypatch):
    one, two = make(), make()
    for _, optimizer in (one, two):
        optimizer.diagnostics()
    fixed = captured(graph, monkeypatch, *one)
    replay(graph, fixed, [5, 6])
    eager(*two, [*range(WARMUP), 5, 6])
    found = one[1].diagnostics()
    assert found == pytest.approx(two[1].diagnostics(), rel=1e-6)
    assert "mkor/mean_cosine" in found


def test_cosines_are_not_those_of_another_step(graph, monkeypatch):
    one, _, fixed = both(graph, monkeypatch)
    one[1].diagnostics()
    eager(*one, [20])
    replay(graph, fixed, [21])
    assert "mkor/mean_cosine" not in one[1].diagnostics()


def test_cosines_come_back_after_loading(graph, monkeypatch):
    one, _, _ = both(graph, monkeypatch)
    saved = make()
    eager(*saved, range(2))
    load(one, saved)
    one[1].diagnostics()
    eager(*one, [7])
    assert "mkor/mean_cosine" in one[1].diagnostics()


class Noting(mkor.Window):
    """Windows that remember which updates they were told of."""

    told: ClassVar[list[int]] = []

    def update_all(self, pairs):
        pairs = list(pairs)
        self.told.append(pairs[0][1].update)
        super().update_all(pairs)


def test_curvatures_are_told_which_update_it_is(graph, monkeypatch):
    model = seeded(Net).to(F64)
    optimizer = mkor.Preconditioned(model, BASES["sgd"](model.parameters()), Noting(**WINDOW))
    Noting.told.clear()
    fixed = captured(graph, monkeypatch, model, optimizer)
    replay(graph, fixed, range(4))
    eager(model, optimizer, range(2))
    assert Noting.told == [0, 1, 2, 3, 7, 8]


def test_what_a_capture_makes_is_not_remembered(monkeypatch):
    """It holds numbers in replays only; what was made before is used in a capture too."""
    made = []

    @memo(maxsize=4)
    def function(x):
        made.append(x)
        return x

    function(1)
    with monkeypatch.context() as patch:
        patch.setattr("mkor.graphs.is_capturing", lambda _=None: True)
        assert [function(1), function(2), function(2)] == [1, 2, 2]
    assert [function(2), function(2)] == [2, 2]
    assert made == [1, 2, 2, 2]


def test_no_gpu_captures_nothing(monkeypatch):
    """Nor is the driver asked, which raises where torch was built for GPUs and there is none."""

    def ask():
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    assert not mkor.graphs.is_capturing()
    assert not mkor.graphs.is_capturing(torch.ones(2))
    model, optimizer = make()
    eager(model, optimizer, range(2))
    assert optimizer.diagnostics()["mkor/updates"] == 2


def test_passes_alone(graph, monkeypatch):
    """Forward and backward pass are captured, the step is not: the host counts."""
    one, two = make(), make()
    eager(*one, range(WARMUP))
    one[1].zero_grad(set_to_none=True)
    fixed = batch(0, ROWS, F64)
    with graph.capture(monkeypatch):
        passes(one[0], *fixed)
    for i in range(WARMUP, WARMUP + 15):
        replay(graph, fixed, [i])
        one[1].step()
    eager(*two, range(WARMUP + 15))
    check(one, two)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["window", "kfac"])
def test_step_alone(kind, compiled, graph, monkeypatch):
    """Compiled code runs no hooks, which no captured step may ask the device about."""
    torch.compiler.reset()
    one, two = make(kind), make(kind)
    eager(*two, range(PATIENCE + 5))
    if compiled:
        one[0].compile(backend="aot_eager", fullgraph=True)
    eager(*one, range(PATIENCE))
    for i in range(PATIENCE, PATIENCE + 5):
        one[1].zero_grad(set_to_none=False)
        passes(one[0], *batch(i, ROWS, F64))
        if not graph.calls:
            with graph.capture(monkeypatch):
                one[1].step()
        graph.replay()
    check(one, two)
    torch.compiler.reset()


# ------------------------------------------------------------------------------ what must not be


SWITCH = mkor.LossRateSwitch(warmup=100)
REFUSED = {
    "update_every": (make, {"update_every": 2}, "update_every=1"),
    "hybrid": (make, {"hybrid": SWITCH}, "hybrid= decides on the host"),
    "nonfinite": (make, {"nonfinite": "skip"}, 'nonfinite="propagate"'),
    "inverse_every": (make, {"kind": "kfac", "inverse_every": 2}, "inverse_every=1"),
}


def refuse(monkeypatch, optimizer, match):
    before = [f.clone() for f in factors(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr("mkor.graphs.is_capturing", lambda _=None: True)
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
    compare(factors(optimizer), before)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_host_decides_is_refused(name, monkeypatch, as_on_a_gpu):
    """Before anything changes: eager training goes on."""
    build, how, match = REFUSED[name]
    one, two = build(**how), build(**how)
    eager(*one, range(WARMUP))
    passes(one[0], *batch(3, ROWS, F64))
    refuse(monkeypatch, one[1], match)
    eager(*one, range(WARMUP, 6))
    eager(*two, range(6))
    check(one, two)


@pytest.mark.parametrize("how", [{}, {"skip_output": False}], ids=str)
def test_first_step_is_refused(how, monkeypatch, as_on_a_gpu):
    model, optimizer = make(**how)
    passes(model, *batch(0, ROWS, F64))
    refuse(monkeypatch, optimizer, "outside of it")


def test_search_that_has_not_ended_is_refused(monkeypatch, as_on_a_gpu):
    """Steps without a backward pass find no output layer."""
    model, optimizer = make()
    optimizer.step()
    passes(model, *batch(0, ROWS, F64))
    refuse(monkeypatch, optimizer, "outside of it")


def test_first_step_after_loading_is_refused(monkeypatch, as_on_a_gpu):
    model, optimizer = make()
    eager(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    passes(model, *batch(0, ROWS, F64))
    refuse(monkeypatch, optimizer, "outside of it")


def test_new_parameters_are_refused(monkeypatch, as_on_a_gpu):
    model, optimizer = make()
    eager(model, optimizer, range(2))
    optimizer.base.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=F64)))
    refuse(monkeypatch, optimizer, "came or were replaced")


def test_other_micro_batches_are_refused(monkeypatch, as_on_a_gpu):
    """Rows are shared out among as many as the step before had."""
    model, optimizer = make()
    eager(model, optimizer, range(2))
    optimizer.zero_grad()
    passes(model, *batch(2, ROWS, F64), micro=2)
    refuse(monkeypatch, optimizer, "2 backward passes, the step before had 1")


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:gloo", "cpu:gloo,cuda:nccl"])
def test_processes(backend, monkeypatch):
    """A graph repeats NCCL's calls, and nobody else's."""
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda _: backend)
    monkeypatch.setattr(mkor.communication.communicator, "_initialised", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    communicator = mkor.communication.communicator.Communicator("a group")
    assert communicator.capturable == backend.endswith("nccl")


def test_processes_without_nccl_are_refused(monkeypatch, as_on_a_gpu):
    model, optimizer = make()
    eager(model, optimizer, range(2))
    kind = mkor.communication.communicator.Communicator
    monkeypatch.setattr(kind, "capturable", False)
    refuse(monkeypatch, optimizer, "NCCL")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_or_copies(kind, monkeypatch, as_on_a_gpu):
    """In whole eager iterations after the first, as on a GPU."""
    model, optimizer = make(kind)
    eager(model, optimizer, range(2))
    x, y = batch(2, ROWS, F64)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, forbidden)
        with Operators() as operators:
            for _ in range(4):
                optimizer.zero_grad()
                passes(model, x, y)
                optimizer.step()
    assert operators.count > 400
