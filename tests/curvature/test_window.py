"""MKOR's window factors against the naive oracle, through the public interface, over whole runs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mkor import MKOR
from support.cases import UNGROUPED, convolution
from support.recording import Recorder, Twin, gradients

pytestmark = pytest.mark.usefixtures("device")

F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: 1e-10, F32: 1e-4}


def wrapped(model, *, lr=0.05, **how):
    """MKOR over plain SGD, preconditioning everything and rescaling nothing unless told."""
    how = {"rescale": None, "skip_output": False, "rows": None} | how
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=lr), **how)


def assert_same(model, raw, expected, tolerance):
    """``p.grad`` holds the expected gradients, up to the norm of the raw ones."""
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in found:
        error = (found[name] - expected[name]).norm() / raw[name].norm().clamp(min=1e-300)
        assert error < tolerance, f"{name}: {error:.2e}"


def run(model, batches, *, rows=None, tolerance=1e-10, **how):
    """Trains on ``batches`` (each a list of micro-batches) and checks every step's gradients."""
    twin_how = {k: v for k, v in how.items() if k != "lr"}
    optimizer = wrapped(model, rows=rows and 10**6, **how)
    twin = Twin(model, rows=rows, **({"rescale": None} | twin_how))
    moved = 0.0
    for micro in batches:
        optimizer.zero_grad()
        total = sum(len(x) for x in micro)
        for x in micro:
            (model(x).tanh().square().sum() / total).backward()
        raw = gradients(model)
        expected = twin.step(raw)
        optimizer.step()
        assert_same(model, raw, expected, tolerance)
        moved = max(moved, *((expected[n] - raw[n]).norm() / raw[n].norm() for n in raw))
    return moved


runs = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 12), min_size=2, max_size=4),
        "bias": st.booleans(),
        "vectors": st.integers(1, 8),
        "extra_rank": st.integers(0, 20),
        "momentum": st.floats(0.3, 0.99),
        "damping": st.floats(1e-3, 3.0),
        "sides": st.sampled_from(["both", "both", "left", "right"]),
        "inner": st.lists(st.integers(1, 3), max_size=2),
        "batches": st.lists(
            st.lists(st.integers(1, 10), min_size=1, max_size=3), min_size=1, max_size=7
        ),
        "seed": st.integers(0, 10**6),
    }
)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("rows", [None, "runs"])
@given(case=runs)
@settings(max_examples=30)
def test_linear(case, dtype, rows):
    """Random shapes, ranks around the dimension, ages past the window, partly empty updates.

    With ``rows`` larger than any batch, rows are cut into runs of neighbours instead of samples.
    """
    if rows == "runs":  # rows over several micro-batches have a test of their own
        case = case | {"batches": [micro[:1] for micro in case["batches"]]}
    generator = torch.Generator().manual_seed(case["seed"])
    torch.manual_seed(case["seed"])
    layers = [
        layer
        for d_in, d_out in zip(case["widths"], case["widths"][1:], strict=False)
        for layer in (nn.Linear(d_in, d_out, bias=case["bias"], dtype=dtype), nn.Tanh())
    ]
    batches = [
        [
            torch.randn(n, *case["inner"], case["widths"][0], generator=generator, dtype=F64).to(
                dtype
            )
            for n in micro
        ]
        for micro in case["batches"]
    ]
    how = {k: case[k] for k in ("vectors", "momentum", "damping", "sides")}
    rank = case["vectors"] + case["extra_rank"]
    run(nn.Sequential(*layers), batches, rows=rows, rank=rank, tolerance=TOLERANCE[dtype], **how)


def mlp(dtype=F64, bias=True):
    return nn.Sequential(
        nn.Linear(6, 9, bias=bias, dtype=dtype),
        nn.Tanh(),
        nn.Linear(9, 7, bias=bias, dtype=dtype),
        nn.Tanh(),
        nn.Linear(7, 3, bias=bias, dtype=dtype),
    )


def data(steps=12, n=16, dtype=F64):
    return [[torch.randn(n, 6, dtype=dtype)] for _ in range(steps)]


HOW = {"rank": 8, "vectors": 3, "momentum": 0.9, "damping": 0.05}


@pytest.mark.parametrize(
    "how",
    [
        {"rescale": "step"},
        {"rescale": "running"},
        {"rescale": "running", "momentum": 0.5, "sides": "left"},
        {"update_every": 3},
        {"update_every": 3, "rescale": "running"},
        {"update_every": 5, "rescale": "step", "sides": "right"},
        {"rank": 100},
        {"rank": 3},
        {"vectors": 1, "rank": 1},
        {"vectors": 8, "rank": 8},
    ],
    ids=str,
)
def test_options(how):
    """Every option of the factor and of the rescaling, over a run longer than the window."""
    moved = run(mlp(), data(), **(HOW | how))
    assert moved > 0.01  # the oracle does something here that raw gradients would not pass


@pytest.mark.parametrize("name", UNGROUPED)
def test_convolutions(name):
    """Each kind of convolution, against rows of a brute-force unfold of the whole batch."""
    layer, images = convolution(name)
    run(
        nn.Sequential(layer),
        [[images(5)], [images(2), images(4)], [images(1)]],
        **(HOW | {"vectors": 2}),
    )


def test_large_and_small_entries():
    """The factors are invariant: neither tiny gradients nor huge inputs need another damping."""
    batches = [[1e4 * micro[0]] for micro in data(6)]
    run(mlp(), batches, **HOW)
    model, calm = mlp(dtype=F32), mlp(dtype=F32)
    calm.load_state_dict(model.state_dict())
    optimizers = [wrapped(m, lr=0.0, **HOW) for m in (model, calm)]
    for (x,) in data(6, dtype=F32):
        for m, optimizer, scale in zip((model, calm), optimizers, (2.0**-40, 1.0), strict=True):
            optimizer.zero_grad()
            (scale * m(x).square().mean()).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), calm.parameters(), strict=True):
        torch.testing.assert_close(p.grad * 2.0**40, q.grad, rtol=1e-4, atol=1e-6)


def test_a_side_without_signal_is_the_identity():
    """LoRA's second matrix starts at 0: no gradient reaches the first, whose left side is 0."""
    lora_a, lora_b = nn.Linear(6, 2, bias=False, dtype=F64), nn.Linear(2, 5, bias=False, dtype=F64)
    nn.init.zeros_(lora_b.weight)
    model = nn.Sequential(lora_a, lora_b)
    optimizer = wrapped(model, **HOW)
    twin = Twin(model, **HOW)
    for (x,) in data(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        raw = gradients(model)
        expected = twin.step(raw)
        optimizer.step()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        for name, M in gradients(model).items():
            torch.testing.assert_close(M, expected[name], rtol=1e-9, atol=1e-12)


def test_zero_gradient_is_left_alone():
    """``0 / 0`` of the rescaling: a zero gradient stays zero."""
    for rescale in ("step", "running", None):
        model = mlp()
        optimizer = wrapped(model, **(HOW | {"rescale": rescale}))
        for (x,) in data(3):
            optimizer.zero_grad()
            (0 * model(x).sum()).backward()
            optimizer.step()
            assert all((p.grad == 0).all() for p in model.parameters())


def test_base_takes_the_step():
    """What reaches the parameters is ``lr`` times the preconditioned gradient, no more."""
    model = mlp()
    optimizer = wrapped(model, lr=0.25, **HOW)
    for (x,) in data(3):
        before = copy.deepcopy(list(model.parameters()))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for old, p in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(p, old - 0.25 * p.grad)


def test_layer_used_twice():
    """Both uses of a layer are rows of one update; part ``j`` of each goes into slot ``j``."""
    torch.manual_seed(1)
    inner = nn.Linear(6, 6, dtype=F64)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), inner)
    run(model, [[torch.randn(n, 6, dtype=F64)] for n in (7, 2, 5, 5)], **HOW)


def test_layer_unused_in_some_steps():
    """A step without data passes the gradient through and does not age the window."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 5, dtype=F64)
            self.second = nn.Linear(6, 5, dtype=F64)

        def forward(self, x, which):
            return getattr(self, which)(x)

    model = Either()
    optimizer = wrapped(model, **HOW)
    twin = Twin(model, **HOW)
    for i, (x,) in enumerate(data(8)):
        optimizer.zero_grad(set_to_none=True)
        model(x, "first" if i % 3 else "second").square().mean().backward()
        raw = gradients(model)
        assert len(raw) == 1
        expected = twin.step(raw)
        optimizer.step()
        assert_same(model, raw, expected, 1e-10)


def test_gradient_without_data_passes_through():
    """A layer that saw no data in this step keeps its raw gradient, bitwise."""
    model = mlp()
    optimizer = wrapped(model, **HOW)
    for (x,) in data(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    raw = [torch.randn_like(p) for p in model.parameters()]
    optimizer.zero_grad()
    for p, g in zip(model.parameters(), raw, strict=True):
        p.grad = g.clone()
    optimizer.step()
    for p, g in zip(model.parameters(), raw, strict=True):
        assert torch.equal(p.grad, g)


def test_one_unbatched_sample():
    """An input without a batch dimension is one sample: one vector, whatever ``vectors`` says."""
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
    optimizer, twin = wrapped(model, **HOW), Twin(model, **HOW)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, dtype=F64)).square().sum().backward()
        raw = gradients(model)
        expected = twin.step(raw)
        optimizer.step()
        assert_same(model, raw, expected, 1e-10)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=F64))
    optimizer, twin = wrapped(conv, **HOW), Twin(conv, **HOW)
    for _ in range(4):
        optimizer.zero_grad()
        conv(torch.randn(2, 5, 5, dtype=F64)).square().sum().backward()
        raw = gradients(conv)
        expected = twin.step(raw)
        optimizer.step()
        assert_same(conv, raw, expected, 1e-10)


def test_recorder_does_not_disturb():
    """The hooks of these tests change nothing: with and without them the weights are equal."""
    torch.manual_seed(3)
    model = mlp()
    watched = copy.deepcopy(model)
    Recorder(watched)
    for m in (model, watched):
        torch.manual_seed(4)
        optimizer = wrapped(m, **HOW)
        for (x,) in data(4):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
