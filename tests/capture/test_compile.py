"""Compiled models are preconditioned as eager ones are, in full graphs and without recompiling."""

import copy
import gc
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from mkor import KFAC, MKOR, DenseMKOR, Eva
from support.contestants import Net, backward, base_state, batch, factors, seeded, train, weights

WINDOW = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9, "damping": 0.05}

# The compiler itself instantiates every autograd function that it traces, which torch deprecates.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    gc.collect()  # wrappers of a failed test
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """The ``aot_eager`` backend, counting the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


def wrapped(model, **how):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return MKOR(model, base, **(WINDOW | how))


def compare(make, steps=6, *, compile_how=None, train=train, **how):
    """The same run, compiled and eager: the same weights and factors up to rounding."""
    model, other = seeded(make), seeded(make)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, **({"fullgraph": True} | (compile_how or {})))
    before = weights(model)
    eager = wrapped(other, **how)
    train(other, eager, steps)
    optimizer = wrapped(compiled, **how)
    train(compiled, optimizer, steps)
    assert backend.graphs > 0
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    found, expected = factors(optimizer), factors(eager)
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert any(f.is_floating_point() and f.norm() > 0 for f in found)
    assert any(not torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))
    return optimizer, backend


def outputs(optimizer):
    return [row.parameter for row in optimizer.coverage() if "output" in row.reason]


@pytest.mark.parametrize("how", [{}, {"rows": None, "sides": "left"}, {"rows": 100}], ids=str)
def test_full_graph_equals_eager(how):
    """Chunks move from update to update inside the same compiled code."""
    optimizer, backend = compare(Net, **how)
    assert outputs(optimizer) == ["output.weight", "output.bias"]
    assert backend.graphs == 1


class Lines(nn.Module):
    """Convolutions of whose images a few lines are used, at edges too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, (3, 2), stride=(2, 1), padding=(3, 0))
        self.output = nn.Linear(3 * 10 * 15, 3)

    def forward(self, x):
        x = nn.functional.interpolate(x, size=(16, 16))
        return self.output(self.second(self.first(x).tanh()).tanh().flatten(1))


def test_moving_lines_of_images():
    """Lines move from update to update inside the same compiled code."""
    _, backend = compare(Lines, 20)
    assert backend.graphs == 1


def test_module_compiled_in_place():
    """``model.compile()`` keeps the module's class; hooks are traced all the same."""
    model, other = seeded(), seeded()
    backend = Counting()
    eager = wrapped(other)
    train(other, eager, 4)
    optimizer = wrapped(model)
    model.compile(backend=backend, fullgraph=True)
    train(model, optimizer, 4)
    assert backend.graphs == 1
    for p, q in zip(factors(optimizer), factors(eager), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_update_every_costs_one_more_graph():
    _, backend = compare(Net, 8, update_every=3, skip_output=False)
    assert backend.graphs <= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_break_after_a_layer():
    """What lies behind a graph break is captured as well."""

    class Broken(Net):
        def forward(self, x):
            x = self.first(self.conv(x).relu().flatten(1))
            torch._dynamo.graph_break()
            x = self.again(self.norm(x)).tanh()
            torch._dynamo.graph_break()
            return self.output(x)

    compare(Broken, compile_how={"fullgraph": False})


def test_in_place_activation_and_repeated_layer():
    class InPlace(Net):
        def forward(self, x):
            x = torch.relu_(self.conv(x)).flatten(1)
            return self.output(self.again(self.again(self.first(x)).relu_()).tanh_())

    compare(InPlace)


def test_accumulation():
    def accumulate(model, optimizer, steps):
        for i in range(steps):
            optimizer.zero_grad()
            backward(model, 2 * i)
            backward(model, 2 * i + 1)
            optimizer.step()

    compare(Net, train=accumulate)


def test_passes_that_do_not_count():
    """Evaluation, unused forward passes and ``no_capture`` add nothing in compiled code either."""

    def busy(model, optimizer, steps):
        for i in range(steps):
            if model is not getattr(model, "_orig_mod", model):
                with torch.no_grad():
                    model(batch(50)[0])
                model(batch(51)[0])
                with optimizer.no_capture():
                    backward(model, 52)
                backward(model, 53)
            optimizer.zero_grad()
            backward(model, i)
            optimizer.step()

    compare(Net, train=busy)


@pytest.mark.parametrize("how", [{}, {"rows": None}], ids=str)
def test_changing_batch_size(how):
    """Other sizes than the first may recompile, and stay right, with fewer rows than parts too."""

    def sizes(model, optimizer, steps):
        for i in range(steps):
            optimizer.zero_grad()
            backward(model, i, n=(12, 12, 5, 1, 9)[i])
            optimizer.step()

    class Flat(Net):
        def forward(self, x):
            return self.output(self.first(x.flatten(1).repeat(1, 3)).tanh())

    compare(Flat, 5, train=sizes, compile_how={"dynamic": None}, **how)


def test_checkpointing():
    class Checkpointed(Net):
        def forward(self, x):
            x = self.first(self.conv(x).relu().flatten(1))
            middle = lambda h: self.again(self.norm(h)).tanh()  # noqa: E731
            return self.output(torch.utils.checkpoint.checkpoint(middle, x, use_reentrant=False))

    compare(Checkpointed)


def test_autocast():
    def mixed(model, optimizer, steps):
        for i in range(steps):
            optimizer.zero_grad()
            x, y = batch(i)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
            nn.functional.cross_entropy(out.float(), y).backward()
            optimizer.step()

    model = seeded()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = wrapped(compiled)
    mixed(compiled, optimizer, 4)
    assert optimizer.diagnostics()["mkor/updates"] == 4
    assert all(f.isfinite().all() for f in factors(optimizer))
    assert {f.dtype for f in factors(optimizer) if f.is_floating_point()} == {torch.float32}


def test_resume():
    """A compiled run resumes an eager one's checkpoint, and the other way round."""
    model = seeded()
    optimizer = wrapped(model)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 3)
    other = seeded(seed=1)
    other.load_state_dict(saved[0])
    backend = Counting()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    resumed = wrapped(compiled)
    resumed.load_state_dict(saved[1])
    train(compiled, resumed, 3, 3)
    assert backend.graphs == 1
    for p, q in zip(factors(optimizer), factors(resumed), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for p, q in zip(base_state(optimizer), base_state(resumed), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_wrapping_after_the_first_compiled_call():
    """Compiled code ignores hooks that come later: an error says so, and says what to do."""
    model = seeded()
    compiled = torch.compile(model, backend="aot_eager")
    # As in a process that has no wrapper yet, compiled code does not look for new hooks.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        backward(compiled, 0)
    optimizer = wrapped(compiled, skip_output=False)
    with pytest.raises(RuntimeError, match="before the first call of a compiled model"):
        train(compiled, optimizer, 100)
    optimizer.close()
    torch.compiler.reset()
    optimizer = wrapped(compiled)
    train(compiled, optimizer, 3)
    assert factors(optimizer)


def test_steps_without_data_are_no_error():
    """Only backward passes without captures are suspicious."""
    model = seeded()
    optimizer = wrapped(model)
    for _ in range(100):
        optimizer.step()
    train(model, optimizer, 2)


def compiles(backend=None):
    """Whether compiled code runs compiled now."""
    backend = backend or Counting()
    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    function(torch.ones(3))
    return backend.graphs == 1


@pytest.mark.parametrize("end", ["step", "close", "delete", "error"])
def test_compiler_is_left_as_it_was(end):
    """The search for the output layer runs eagerly; whatever ends it, compiling goes on."""
    model = seeded()
    if end == "error":
        with pytest.raises(ValueError, match="rescale"):
            wrapped(model, rescale="wrong")
    optimizer = wrapped(model)
    if end == "step":
        train(model, optimizer, 1)
    elif end == "close":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
    assert compiles()


def test_compiler_with_two_searches():
    one, two = seeded(), seeded()
    first, second = wrapped(one), wrapped(two)
    train(one, first, 1)
    second.close()
    assert compiles()


def test_model_without_hooks_does_not_end_captures():
    """Another compiled model of the same class, trained in between, shares no code with it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x).tanh())

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()

    one, two = Net(), Net()
    optimizer = MKOR(one, torch.optim.SGD(one.parameters(), lr=0.01))
    compiled, plain = (torch.compile(model, backend="aot_eager") for model in (one, two))
    train(compiled, optimizer, 12)
    train(plain, torch.optim.SGD(two.parameters(), lr=0.01), 3)
    train(compiled, optimizer, 5)
    assert optimizer.state[one.a.weight]["mkor_updates"] == 17


@pytest.mark.parametrize("kind", [MKOR, DenseMKOR, KFAC, Eva])
@pytest.mark.parametrize("what", ["step", "iteration"])
def test_compiled_step(what, kind):
    """The step runs as it is; compiled, each number that it counts would make code of its own."""
    model, other = seeded(), seeded()
    how = {MKOR: WINDOW, DenseMKOR: {"update_every": 3}}.get(kind, {"damping": 0.1})
    optimizer, eager = (
        kind(m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5), **how)
        for m in (model, other)
    )
    backend = Counting()
    step = torch.compile(optimizer.step, backend=backend) if what == "step" else optimizer.step

    def iteration(x, y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step()

    if what == "iteration":
        iteration = torch.compile(iteration, backend=backend)
    train(other, eager, 8)
    for i in range(8):
        iteration(*batch(i))
    for p, q in zip(
        weights(model) + factors(optimizer), weights(other) + factors(eager), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    # Clearing gradients, and the forward pass, which an update changes where not all steps update.
    assert backend.graphs == (0 if what == "step" else 2 + (kind is DenseMKOR))


def little():
    """For what takes long to compile."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
# Inductor's own, and of this version of torch:
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated")
@pytest.mark.parametrize(("kind", "make"), [(MKOR, Net), (KFAC, little)], ids=["mkor", "kfac"])
def test_inductor(kind, make):
    """In one graph by the default backend: the same weights as eager up to rounding."""
    model, other = seeded(make), seeded(make)
    how = WINDOW if kind is MKOR else {"damping": 0.1}
    counters.clear()
    made = []
    # In turn: until a wrapper has found the output layer, nothing compiled runs anywhere.
    for m in (torch.compile(model, fullgraph=True), other):
        made.append(kind(m, torch.optim.SGD(m.parameters(), lr=0.05), **how))
        train(m, made[-1], 4)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]
    for p, q in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    updates = [s["mkor_updates"] for s in made[0].state.values() if "mkor_updates" in s]
    assert sorted(map(int, updates)) == [0, *[4] * (len(updates) - 1)]  # 0: the output layer
