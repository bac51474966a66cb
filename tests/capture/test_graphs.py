"""Whole steps as CUDA graphs repeat them, emulated on a CPU: ``support.graph`` says how."""

import copy

import pytest
import torch
from torch import nn

import mkor
from support.contestants import base_state, batch, factors, seeded, weights
from support.graph import Graph, capturing, watched

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
    """Lines of images, small layers of one shape, one of them used twice, tokens, attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.strided = nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 0))
        self.first, self.second = nn.Linear(20, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.third = Own(8, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.interpolate(x, size=(16, 10))
        x = self.strided(self.conv(x).tanh()).tanh()  # [n, 4, 9, 5]
        x = self.first(x.movedim(2, 1).flatten(2)).tanh()  # [n, 9, 8]
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.output(self.second(self.third(self.second(x).tanh())).tanh().mean(1))


def make(kind="window", base="momentum", **how):
    model = seeded(Net).to(F64)
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


def captured(graph, model, optimizer, micro=1):
    """Torch's recipe: some steps, no gradients, then one step on tensors that stay."""
    eager(model, optimizer, range(WARMUP), micro)
    optimizer.zero_grad(set_to_none=True)
    fixed = batch(0, ROWS, F64)
    with graph.capture():
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


def both(graph, micro=1, **how):
    """A run of replays, and its twin's of eager steps."""
    one, two = make(**how), make(**how)
    fixed = captured(graph, *one, micro)
    replay(graph, fixed, range(WARMUP, WARMUP + REPLAYS))
    eager(*two, range(WARMUP + REPLAYS), micro)
    check(one, two)
    return one, two, fixed


@pytest.mark.parametrize(
    ("kind", "base", "micro"),
    [
        *((kind, "momentum", 1) for kind in KINDS),
        ("window", "sgd", 2),
        ("window", "adamw", 1),
        ("clipped", "rate as a tensor", 2),
        ("kfac", "sgd", 2),
    ],
)
def test_replays_and_eager_steps_in_turn_are_eager_steps(kind, base, micro):
    """Rows move, steps are counted, and a checkpoint of the middle resumes."""
    graph = Graph()
    one, two, fixed = both(graph, micro, kind=kind, base=base)
    figures = one[1].diagnostics()
    assert figures == pytest.approx(two[1].diagnostics(), rel=1e-6)
    assert figures["mkor/steps"] == figures["mkor/updates"] == WARMUP + REPLAYS
    for step in (20, 22):
        kept = [p.grad for p in one[0].parameters()]
        for model, optimizer in (one, two):
            eager(model, optimizer, [step], micro)
        check(one, two)
        for p, gradient in zip(one[0].parameters(), kept, strict=True):
            p.grad = gradient
        replay(graph, fixed, [step + 1])
        eager(*two, [step + 1], micro)
    check(one, two)
    resumed = make(kind, base)
    load(resumed, one)
    for each in (one, resumed):
        eager(*each, range(24, 28), micro)
    check(one, resumed)


def test_a_rate_that_is_a_tensor_may_change():
    """Base and clip read it in every replay."""
    graph, one, two = Graph(), *(make("clipped", "rate as a tensor") for _ in range(2))
    fixed = captured(graph, *one)
    eager(*two, range(WARMUP))
    for i, rate in enumerate((0.05, 0.4, 0.01), WARMUP):
        for _, optimizer in (one, two):
            optimizer.param_groups[0]["lr"].fill_(rate)
        replay(graph, fixed, [i])
        eager(*two, [i])
    check(one, two)


@pytest.mark.parametrize("seldom", [False, True])
def test_a_new_graph_after_loading(seldom):
    """The host leads again, also where the checkpoint has more steps than updates."""
    graph = Graph()
    one, two, _ = both(graph)
    saved = make(update_every=3) if seldom else make()
    eager(*saved, range(5))
    for old in (one, two):
        load(old, saved)
    again = Graph()
    fixed = captured(again, *one)
    replay(again, fixed, range(WARMUP, 6))
    eager(*two, range(6))
    check(one, two)
    figures = one[1].diagnostics()
    assert (figures["mkor/steps"], figures["mkor/updates"]) == (11, 8 if seldom else 11)


def test_new_group_after_replays():
    """Counters come along; eager steps go on."""

    def make_partly():
        model = seeded(Net).to(F64)
        base = BASES["momentum"](model.conv.parameters())
        base.add_param_group({"params": model.first.parameters()})
        return model, mkor.MKOR(model, base, **WINDOW)

    graph, one, two = Graph(), make_partly(), make_partly()
    fixed = captured(graph, *one)
    replay(graph, fixed, range(WARMUP, 6))
    eager(*two, range(6))
    for model, optimizer in (one, two):
        optimizer.add_param_group({"params": model.second.parameters()})
        eager(model, optimizer, range(6, 9))
    compare(weights(one[0]), weights(two[0]))
    assert one[1].diagnostics()["mkor/steps"] == 9


def test_cosines_are_those_of_the_last_step_or_missing():
    graph, one, two = Graph(), make(), make()
    for _, optimizer in (one, two):
        optimizer.diagnostics()
    fixed = captured(graph, *one)
    replay(graph, fixed, [5, 6])
    eager(*two, [*range(WARMUP), 5, 6])
    found = one[1].diagnostics()  # asked for before the capture: measured in replays too
    assert found == pytest.approx(two[1].diagnostics(), rel=1e-6)
    assert "mkor/mean_cosine" in found
    one, _, fixed = both(graph := Graph())
    one[1].diagnostics()
    eager(*one, [20])
    replay(graph, fixed, [21])
    assert "mkor/mean_cosine" not in one[1].diagnostics()
    saved = make()
    eager(*saved, range(2))
    load(one, saved)
    one[1].diagnostics()
    eager(*one, [7])
    assert "mkor/mean_cosine" in one[1].diagnostics()


def test_no_gpu_captures_nothing(monkeypatch):
    """Nor is the driver asked, which raises where torch was built for GPUs and there is none."""

    def ask():
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    model, optimizer = make()
    eager(model, optimizer, range(2))
    assert optimizer.diagnostics()["mkor/updates"] == 2


def test_passes_alone():
    """Forward and backward pass are captured, the step is not: the host counts."""
    graph, one, two = Graph(), make(), make()
    eager(*one, range(WARMUP))
    one[1].zero_grad(set_to_none=True)
    fixed = batch(0, ROWS, F64)
    with graph.capture():
        passes(one[0], *fixed)
    for i in range(WARMUP, WARMUP + 15):
        replay(graph, fixed, [i])
        one[1].step()
    eager(*two, range(WARMUP + 15))
    check(one, two)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["window", "kfac"])
def test_step_alone(kind, compiled):
    """Compiled code runs no hooks, which no captured step may ask the device about."""
    torch.compiler.reset()
    # Compiled attention is not preconditioned.
    graph, one, two = Graph(), *(make(kind, skip=["attention"]) for _ in range(2))
    warmup = 25  # more than the steps in which a model without captures is not yet suspicious
    eager(*two, range(warmup + 5))
    if compiled:
        one[0].compile(backend="aot_eager", fullgraph=True)
    eager(*one, range(warmup))
    for i in range(warmup, warmup + 5):
        one[1].zero_grad(set_to_none=False)
        passes(one[0], *batch(i, ROWS, F64))
        if not graph.calls:
            with graph.capture():
                one[1].step()
        graph.replay()
    check(one, two)
    torch.compiler.reset()


# ------------------------------------------------------------------------------ what must not be


def refuse(optimizer, match):
    before = [f.clone() for f in factors(optimizer)]
    with capturing(), pytest.raises(RuntimeError, match=match):
        optimizer.step()
    compare(factors(optimizer), before)


SWITCH = mkor.LossRateSwitch(warmup=100)
REFUSED = {
    "update_every": ({"update_every": 2}, "update_every=1"),
    "hybrid": ({"hybrid": SWITCH}, "hybrid= decides on the host"),
    "nonfinite": ({"nonfinite": "skip"}, 'nonfinite="propagate"'),
    "inverse_every": ({"kind": "kfac", "inverse_every": 2}, "inverse_every=1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_host_decides_is_refused(name):
    """Before anything changes: eager training goes on."""
    how, match = REFUSED[name]
    one, two = make(**how), make(**how)
    eager(*one, range(WARMUP))
    passes(one[0], *batch(3, ROWS, F64))
    refuse(one[1], match)
    eager(*one, range(WARMUP, 6))
    eager(*two, range(6))
    check(one, two)


def loaded(model, optimizer):
    eager(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())


def grown(model, optimizer):
    eager(model, optimizer, range(2))
    optimizer.base.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=F64)))


def cut(model, optimizer):
    eager(model, optimizer, range(2))
    optimizer.zero_grad()
    passes(model, *batch(2, ROWS, F64))  # with the one of the test, two


@pytest.mark.parametrize(
    ("before", "how", "match"),
    [
        (None, {}, "outside of it"),
        (None, {"skip_output": False}, "outside of it"),
        (lambda _, optimizer: optimizer.step(), {}, "outside of it"),  # no output layer found
        (loaded, {}, "outside of it"),
        (grown, {}, "came or were replaced"),
        (cut, {}, "2 backward passes, the step before had 1"),
    ],
    ids=["first", "no search", "in search", "loaded", "new parameter", "other micro-batches"],
)
def test_steps_that_prepare_something_are_refused(before, how, match):
    model, optimizer = make(**how)
    if before:
        before(model, optimizer)
    passes(model, *batch(0, ROWS, F64))
    refuse(optimizer, match)


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:gloo", "cpu:gloo,cuda:nccl"])
def test_processes_without_nccl_are_refused(backend, monkeypatch):
    """A graph repeats NCCL's calls, and nobody else's."""
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda _: backend)
    monkeypatch.setattr(mkor.distributed.communicator, "_initialised", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    kind = mkor.distributed.communicator.Communicator
    assert kind("a group").capturable == backend.endswith("nccl")
    monkeypatch.undo()
    model, optimizer = make()
    eager(model, optimizer, range(2))
    monkeypatch.setattr(kind, "capturable", False)
    refuse(optimizer, "NCCL")


NEVER = mkor.LossRateSwitch(warmup=1000, every=1000)


@pytest.mark.parametrize("kind", [*KINDS, "hybrid"])
def test_nothing_waits_or_copies(kind):
    """In whole eager iterations after the first, ``report_loss`` of a tensor included."""
    hybrid = kind == "hybrid"
    model, optimizer = make(**({"hybrid": NEVER} if hybrid else {"kind": kind}))
    eager(model, optimizer, range(2))
    x, y = batch(2, ROWS, F64)
    with watched() as operators:
        for _ in range(4):
            optimizer.zero_grad()
            passes(model, x, y)
            if hybrid:
                optimizer.report_loss(x.sum())
            optimizer.step()
    assert operators.count > 400
