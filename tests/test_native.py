"""The compiled kernels compute what torch's operators do, in float32, and only there."""

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mkor import MKOR, linalg, native
from mkor.curvature.contract import BatchShape, Statistics
from mkor.curvature.window import Window
from mkor.layers.kinds import describe
from mkor.layers.linear import SMALL
from mkor.layers.sums import Pick
from mkor.step.roster import Roster

F32, F64 = torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")

VERSIONS = native.loading._kernels.versions() if native.in_use() else [None]
"""What this processor can run."""


@pytest.fixture(params=VERSIONS)
def version(request):
    """The kernels as they were compiled for one kind of processor."""
    kernels = native.loading._kernels
    before = kernels.version()
    kernels.use(request.param)
    yield request.param
    kernels.use(before)


COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
"""What extensions are built with."""
in_use = pytest.mark.skipif(not native.in_use(), reason="the kernels were not compiled")


def compiled(test):
    """Run a test with every version of the kernels."""
    return in_use(pytest.mark.usefixtures("version")(test))


@pytest.fixture
def used(monkeypatch):
    """How often each kernel ran."""
    found, kernels = Counter(), native.loading._kernels

    def counting(name):
        def call(*args):
            found[name] += 1
            return getattr(kernels, name)(*args)

        return call

    choosing = ("versions", "version", "use")
    names = [name for name in dir(kernels) if not name.startswith("_") and name not in choosing]
    counters = {name: counting(name) for name in names}
    monkeypatch.setattr("mkor.native.loading._kernels", SimpleNamespace(**counters))
    return found


def assert_close(found, expected, tolerance=1e-6):
    """Up to a share of the largest entry; what is not finite is so at the same places."""
    found, expected = found.double(), expected.double()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    close = {"rtol": 0.0, "atol": tolerance * scale, "equal_nan": True}
    torch.testing.assert_close(found, expected, **close)


def assert_sums(sums, x, pick, tolerance=1e-6):
    """Of one call and of several, as torch's operators make them of the same numbers in float64."""
    for xs in ([x, x.flip(0).contiguous(), 2 * x], x):
        found = sums(xs, pick)
        expected = sums([t.double() for t in xs] if isinstance(xs, list) else xs.double(), pick)
        assert found.vectors.dtype == F32
        assert_close(found.vectors, expected.vectors, tolerance)
        assert_close(found.square, expected.square, tolerance)
        assert (found.counts, found.total) == (expected.counts, expected.total)


LEADS = [(), (1,), (3,), (9,), (64,), (131,), (5, 3), (2, 3, 4), (16, 4), (3, 50)]


WIDTHS = [1, 15, 16, 17, 70]


@compiled
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [None, 1, 2, 5, 16])
def test_rows(width, rows, used):
    kind = describe(nn.Linear(width, width))[0].kind
    for i, lead in enumerate(LEADS):
        x = torch.randn(*lead, width) + 0.5
        # In turn: every shape meets each update with some width, whatever the rows.
        update = (0, 1, 7)[(i + WIDTHS.index(width)) % 3]
        assert_sums(kind.input_sums, x, Pick(4, rows, update))
        assert_sums(kind.output_sums, x, Pick(4, rows, update))
    assert used["side_sums"] == 8 * len(LEADS)


@compiled
def test_long_sums_keep_their_digits():
    image = describe(nn.Conv2d(2, 2, 3, padding=1))[0].kind
    rows = describe(nn.Linear(3, 3))[0].kind
    for kind, x in ((image, torch.rand(4, 2, 100, 300)), (rows, torch.rand(90_000, 3))):
        assert_sums(kind.input_sums, x, Pick(2, None, 0), 1e-5)
        assert_sums(kind.output_sums, x, Pick(2, None, 0), 1e-5)


CONVOLUTIONS = [
    (nn.Conv1d, {"kernel_size": 3}, (20,)),
    (nn.Conv3d, {"kernel_size": 2}, (3, 4, 3)),
    (nn.Conv2d, {"kernel_size": 1}, (4, 4)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (8, 17)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (40, 33)),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}, (9, 7)),
    (nn.Conv2d, {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)}, (5, 16)),
    (nn.Conv2d, {"kernel_size": (3, 1), "padding": "same", "dilation": (2, 1)}, (20, 9)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)}, (9, 6)),
    (nn.Conv2d, {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}, (20, 31)),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}, (9, 8)),
    (nn.Conv2d, {"kernel_size": (1, 3), "stride": (1, 3), "padding": (0, 2)}, (3, 700)),
    (nn.Conv2d, {"kernel_size": 7, "padding": 3}, (2, 3)),
    (nn.Conv2d, {"kernel_size": 5, "padding": 6}, (3, 4)),
    (nn.Conv2d, {"kernel_size": 3, "stride": 4}, (19, 19)),
    (nn.Conv2d, {"kernel_size": 6}, (6, 6)),
    (nn.Conv2d, {"kernel_size": 6, "padding": 1}, (6, 6)),
]


@compiled
@pytest.mark.parametrize(("layer", "how", "sizes"), CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_patches(layer, how, sizes, used):
    layer = layer(3, 4, **how)
    kind = describe(layer)[0].kind
    for i, images in enumerate((1, 2, 4, 7, 13)):
        x = torch.randn(images, 3, *sizes) + 0.5
        with torch.no_grad():
            g = layer(x)
        # Few rows are cut lines, some of them whole images, many of them several images.
        for j, rows in enumerate((None, 1, 8, 60, 10**4)):
            # In turn: each number of images and each number of rows meet every update.
            update = (0, 1, 5)[(i + j) % 3]
            assert_sums(kind.input_sums, x, Pick(4, rows, update), 2e-6)
            assert_sums(kind.output_sums, g, Pick(4, rows, update), 2e-6)
    one, alike = (kind.input_sums(image, Pick(4, 8, 1)) for image in (x[0], x[:1]))
    assert torch.equal(one.vectors, alike.vectors)
    if type(layer) is nn.Conv2d:
        assert used == {"side_sums": 2 * 5 * 5 * 4 + 2}
    else:
        assert not used


@compiled
def test_taps_beyond_the_image():
    """They see exactly nothing, whatever the image holds."""
    kind = describe(nn.Conv2d(5, 1, (1, 9), padding=(0, 4)))[0].kind
    taps = kind.input_sums(torch.randn(60, 5, 3, 3), Pick(4, None, 0)).vectors.view(20, 9)
    assert (taps != 0).any(0).tolist() == [False] * 2 + [True] * 5 + [False] * 2


@compiled
def test_taps_that_see_few_columns():
    """What the others hold costs them no digits."""
    kind = describe(nn.Conv2d(1, 1, (1, 6)))[0].kind
    x = torch.randn(8, 1, 4, 6) * 10.0 ** torch.arange(0, -12, -2)
    found, exact = (kind.input_sums(t, Pick(4, None, 0)).vectors for t in (x, x.double()))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def copied(state, dtype=None):
    return {k: v.to(dtype if v.is_floating_point() else None, copy=True) for k, v in state.items()}


@compiled
@pytest.mark.parametrize("sides", [("left", "right"), ("left",), ("right",)], ids="+".join)
@pytest.mark.parametrize("rank", [5, 6, 10, 16, 17])
def test_ring(rank, sides, used):
    """Slots partly filled, layers that do not accept, and the ring goes round."""
    window = Window(rank=rank, vectors=5, momentum=0.8)
    shape = BatchShape(3, 37, 18, True, sides, F32, CPU)
    state = window.init(shape)
    exact = copied(state, F64)
    for update in range(9):
        filled = torch.rand(3, 5) < (0.0, 0.5, 1.0)[update % 3]
        accept = torch.tensor([True, update % 2 == 0, update % 4 != 1])
        vectors = {side: torch.randn(3, 5, shape.width(side)) for side in sides}
        square = {side: torch.rand(3) for side in sides}
        before = copied(state)
        # What an empty slot holds is nobody's.
        offered = {k: x.masked_fill(~filled.unsqueeze(2), NAN) for k, x in vectors.items()}
        window.update(state, Statistics(offered, square, filled, accept, update))
        vectors, square = copied(vectors, F64), copied(square, F64)
        window.update(exact, Statistics(vectors, square, filled, accept, update))
        for key, found in state.items():
            assert_close(found, exact[key])
            assert torch.equal(found[~accept], before[key][~accept]), key
    assert state["written"].max() > rank
    assert used == {"window_update": 9}


@compiled
@pytest.mark.parametrize("rank", [1, 5, 16, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("one", [False, True])
def test_roots(rank, one, used):
    V = torch.randn(7, rank, 40)
    gram, weights = V @ V.mT, torch.rand(7, rank) / rank
    weights[2, rank // 2 :] = 0
    squares = torch.tensor([1.0, 0.0, 3.0, 1.0, 1.0, NAN, 0.3])
    gram[3, -1, -1], gram[4, 0, 0] = NAN, INF
    figures = [(gram, weights, squares), (2 * gram, weights, squares)]
    found = [*linalg.whitening_roots(figures, [one, False], 0.02)]
    exact = [tuple(x.double() for x in each) for each in figures]
    for A, B in zip(found, linalg.whitening_roots(exact, [one, False], 0.02), strict=True):
        for layer in range(7):
            assert_close(A[layer], B[layer].fill_(NAN) if layer in (3, 4) else B[layer], 1e-5)
        assert not A[[1, 5]].any()
        assert not A.nan_to_num().triu(1).any()
    assert used == {"roots": 2}


@compiled
@pytest.mark.parametrize("last", [-1e6, INF, NAN])
@pytest.mark.parametrize("beside", [1.0, 1e30, NAN])
def test_roots_of_what_is_not_positive(last, beside):
    gram = torch.eye(40)
    gram[39, 39], gram[39, 0], gram[0, 39] = last, beside, beside
    figures = (gram.unsqueeze(0), torch.ones(1, 40), torch.ones(1))
    assert next(linalg.whitening_roots([figures], [False], 0.02)).isnan().all()


NUMBERS = {
    "good": {},
    "layers without rows": {2: 0, 5: 0},
    "an empty slot": {(4, 6): 0},
    "infinite": {(1, 0): INF, (8, 1): INF},
    "NaN": {(3, 1): NAN},
    "norms": {},
}


@compiled
@pytest.mark.parametrize("numbers", NUMBERS)
def test_roster(numbers, used):
    meta, norms, results = torch.rand(9, 7) + 0.5, torch.rand(9), []
    meta[:, 3:] = torch.randint(1, 9, (9, 4))
    meta[:, 2] = 2 * meta[:, 3:].sum(1)
    for place, value in NUMBERS[numbers].items():
        meta[place] = value
    if numbers == "norms":
        norms[[3, 6]] = torch.tensor([INF, NAN])
    how = (("left", "right"), F32, CPU)
    shapes = [BatchShape(n, 4 + n, 6 - n, n != 2, *how) for n in (3, 2, 4)]
    rosters = [Roster([replace(s, dtype=t) for s in shapes]) for t in (F32, F64)]
    for some in rosters:
        some.last[0], data = norms, meta.to(some.last.dtype)
        some.check(data)
        results.append(copy.deepcopy(some.count(data, some.bad, 0.375)))
        # The next step may have other slots.
        some.count(data[:, :-1].contiguous(), some.bad, 1.0)
    for key in ("seen", "finite", "bad", "fed", "refused"):
        assert torch.equal(*(getattr(some, key) for some in rosters)), key
    for one, other in zip(*results, strict=True):
        assert one.whole == all(each.whole for each in results[1])
        for key, value in vars(one).items():
            assert key == "whole" or assert_close(value, getattr(other, key)) is None
    assert used == {"check": 1, "count": 2}


def rosters(layers):
    """In float32, which kernels serve, and in float64, which they do not."""
    shapes = [BatchShape(layers, 5, 6, True, ("left", "right"), dtype, CPU) for dtype in (F32, F64)]
    return [Roster([shape]) for shape in shapes]


@compiled
@pytest.mark.parametrize("rescale", ["running", "step", None])
@pytest.mark.parametrize("whole", [False, True])
def test_conclusion(rescale, whole, used):
    """Of layers in the midst of others."""
    raw = torch.tensor([1.0, 0.0, 2.0, 3.0, INF, NAN, 5.0])
    norm = torch.tensor([2.0, 1.0, 0.0, 4.0, 1.0, 1.0, 1.0])
    done = torch.tensor([True, True, True, False, False, False, True]) | whole
    use = torch.tensor([True, True, True, True, False, True, True])
    norms = torch.rand(9, 2)
    norms[1:3] = 0
    ours, exact = rosters(9)
    for some in (ours, exact):
        some.last[0, 1:8], some.norms[:] = raw, norms
    for _ in range(3):
        found, expected = (
            some.conclude(slice(1, 8), norm.to(some.last.dtype), done, use, (0.9, rescale))
            for some in (ours, exact)
        )
        assert_close(found, expected)
        for key in ("norms", "last", "done", "refused"):
            assert_close(getattr(ours, key), getattr(exact, key))
    assert ours.refused[1].tolist() == [0, 0, 0, 0, 3 * (not whole), 0, 3 * (not whole), 0, 0]
    assert ours.done.tolist() == [False, *done.tolist(), False]
    assert used == ({} if rescale is None else {"ratio": 3})


@compiled
@pytest.mark.parametrize("due", [False, True])
def test_which_are_usable(due, used):
    """Every mixture of what is asked of a layer."""
    places = torch.arange(16)
    ours, exact = rosters(16)
    for some in (ours, exact):
        some.updates[:] = 3 * (places & 1)
        some.seen[:], some.finite[:] = (places & 2) > 0, (places & 4) > 0
        some.last[0] = torch.where((places & 8) > 0, 1.0, torch.tensor([INF, NAN]).repeat(8))
    for found, expected in zip(ours.usable(due), exact.usable(due), strict=True):
        assert torch.equal(found, expected)
    assert used == {"usable": 1}
    assert expected.sum() == (1 if due else 4)


@compiled
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 16), (100, 99)])
def test_norms(size, used):
    W, b = torch.randn(3, *size), torch.randn(3, size[0])
    W[1], b[2] = 0, INF
    for bias in (None, b):
        exact = linalg.joint_norm(W.double(), None if bias is None else bias.double())
        assert_close(linalg.joint_norm(W, bias), exact)
    assert used == {"joint_norms": 2}


@compiled
@pytest.mark.parametrize("size", [1, 63, 64, 200])
def test_what_is_finite(size, used):
    x, y = torch.randn(size), torch.randn(3, 70)
    assert linalg.all_finite(x, y)
    for bad in (INF, -INF, NAN):
        for place in {0, size // 2, size - 1}:
            spoiled = x.clone()
            spoiled[place] = bad
            assert not linalg.all_finite(spoiled, y)
            assert not linalg.all_finite(y, spoiled)
    assert set(used) == {"finite"}


class Net(nn.Module):
    """A layer used twice, another of its shape, activations in place, and images."""

    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Linear(10, 14, bias=bias)
        self.twice, self.alike = (nn.Linear(14, 14, bias=bias) for _ in range(2))
        self.image = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
        self.line = nn.Conv1d(4, 3, 2, stride=2, bias=bias)
        self.last = nn.Linear(63, 5, bias=bias)

    def forward(self, x):
        h = self.first(x).relu_()
        h = self.alike(self.twice(torch.tanh(self.twice(h))).sigmoid())
        h = h.view(-1, 2, 7, 1).expand(-1, -1, -1, 6).contiguous()
        return self.last(self.line(self.image(h).relu_().flatten(2)).flatten(1))


def plain(bias=True):
    layers = [nn.Linear(10, 33, bias), nn.ReLU(inplace=True), nn.Linear(33, 5, bias)]
    return nn.Sequential(*layers)


def trained(make, bias=True, *, dtype=F32, n=24, nan=None, twice=False, **how):
    """All preconditioned gradients and factors after each step."""
    torch.manual_seed(3)
    model, found = make(bias).to(dtype), []
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = MKOR(
        model, base, **({"rank": 10, "vectors": 4, "damping": 0.5, "skip_output": False} | how)
    )
    for step in range(6):
        # One batch has fewer rows than there are slots.
        x = torch.randn(3 if step == 2 else n, 10, dtype=F64).to(dtype)
        x[0, 0] = NAN if step == nan else x[0, 0]
        optimizer.zero_grad()
        loss = model(x).tanh().square().mean()
        for _ in range(1 + twice):
            loss.backward(retain_graph=twice)
        for p in model.parameters():
            p.grad.nan_to_num_(0.0)
        optimizer.step()
        state = [v.clone() for entry in optimizer.state.values() for v in entry.values()]
        found.append([*(p.grad.clone() for p in model.parameters()), *state])
    return found


RUNS = {
    "default": {},
    "left": {"sides": "left"},
    "right": {"sides": "right"},
    "every 2": {"update_every": 2},
    "rescaled by step": {"rescale": "step"},
    "not rescaled": {"rescale": None},
    "few rows": {"rows": 2},
    "NaN": {"nan": 3},
    "twice": {"twice": True},
    "large": {"n": SMALL // 10 + 8, "twice": True, "rows": None},
    "large left": {"n": SMALL // 10 + 8, "twice": True, "sides": "left"},
    "large right": {"n": SMALL // 10 + 8, "twice": True, "sides": "right"},
}


@in_use
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("make", [Net, plain])
def test_runs(run, make, monkeypatch):
    # In turn: every run is one of a model with biases and of one without.
    bias = (list(RUNS).index(run) + (make is Net)) % 2 == 0
    how = {"rows": 8} | RUNS[run]
    found = trained(make, bias, **how)
    monkeypatch.setattr("mkor.native.loading._kernels", None)
    expected = trained(make, bias, **how)
    for one, other in zip(found, expected, strict=True):
        for p, q in zip(one, other, strict=True):
            # Either is this far from the same run in float64.
            assert_close(p, q, 5e-4)


@compiled
def test_where_kernels_are_used(used):
    everything = {name for name in vars(native.loading._kernels) if name != "side_sums"}
    for dtype, factors, expected in [
        (F32, None, everything),
        (F64, None, set()),
        (F32, torch.bfloat16, everything - {"window_update"}),
        (F32, torch.float16, everything - {"window_update"}),
    ]:
        used.clear()
        trained(Net, dtype=dtype, factor_dtype=factors)
        assert used.keys() == expected


@compiled
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_none_while_torch_compiles(used):
    torch.compiler.reset()
    model = plain()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(64, 10)).sum().backward()
    assert not used
    optimizer.step()
    assert used["count"]
    torch.compiler.reset()


class Own(torch.Tensor):
    pass


ODD = {
    "subclass": lambda x: x.as_subclass(Own),
    "transposed": lambda x: x.mT,
    "expanded": lambda x: x[:1].expand(4, 4),
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "half": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "without memory": lambda x: torch._efficientzerotensor(x.shape),
    "negated when read": torch._neg_view,
}


@compiled
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors(name):
    x = torch.randn(4, 4)
    assert native.serves(x, x)
    assert not native.serves(x, ODD[name](x))


@compiled
def test_gradients_without_memory():
    """That of ``sgn`` is a tensor of zeros without an address."""
    model = plain()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    torch.sgn(model(torch.randn(64, 10))).backward(torch.ones(64, 5))
    optimizer.step()
    assert not model[0].weight.grad.any()


@pytest.mark.skipif(not shutil.which(COMPILER), reason="there is no C compiler")
@pytest.mark.skipif(os.environ.get("MKOR_NATIVE") == "0", reason="the kernels are switched off")
def test_kernels_were_compiled():
    """A build that failed would go unnoticed: the package works without."""
    assert native.in_use()


@compiled
def test_large_sums_are_left_to_several_threads(monkeypatch, used):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    kind = describe(nn.Linear(4, 4))[0].kind
    x = torch.randn(100, 4)
    for most, calls in ((400, 1), (399, 0)):
        monkeypatch.setattr("mkor.native.loading.ONE_THREAD", most)
        used.clear()
        kind.input_sums(x, Pick(4, None, 0))
        assert used["side_sums"] == calls


SETTINGS = [(None, False), ("0", False), ("1", True), *((name, False) for name in VERSIONS if name)]
"""``MKOR_NATIVE``, and whether the compiled module is missing."""
STEPS = """
import os, sys, torch, torch._dynamo

def step(switch, missing):
    if switch is not None:
        os.environ["MKOR_NATIVE"] = switch
    if missing:
        sys.modules["mkor.native._kernels"] = None
    import mkor, mkor.native
    model = torch.nn.Linear(3, 3)
    optimizer = mkor.MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    model(torch.ones(40, 3)).sum().backward()
    optimizer.step()
    print(mkor.native.version(), flush=True)

assert not any(name.startswith("mkor") for name in sys.modules)
for setting in SETTINGS:
    if os.fork() == 0:
        step(*setting)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {setting}")
"""


@pytest.fixture(scope="module", name="ran")
def _ran():
    """Which version took a step, by setting: in processes of their own, forked from one."""
    run = [sys.executable, "-c", f"SETTINGS = {SETTINGS!r}\n{STEPS}"]
    environment = {key: value for key, value in os.environ.items() if key != "MKOR_NATIVE"}
    found = subprocess.check_output(run, env=environment, text=True).splitlines()
    return dict(zip(SETTINGS, found, strict=True))


@in_use
def test_the_best_version_runs(ran):
    assert ran[None, False] == VERSIONS[0]


@pytest.mark.parametrize("setting", [("0", False), ("1", True)])
def test_package_works_without_kernels(setting, ran):
    assert ran[setting] == "None"


@compiled
def test_choosing_a_version(version, ran):
    assert ran[version, False] == version
    assert native.version() == version
    with pytest.raises(ValueError, match="no version 'sse9'"):
        native.loading._kernels.use("sse9")
    assert native.version() == version


@pytest.mark.parametrize("missing", [False, True])
def test_asking_for_a_version_that_is_not_there(missing, monkeypatch):
    """A run that should round as others do must not round in another way."""
    if missing:
        monkeypatch.setitem(sys.modules, "mkor.native._kernels", None)
    for asked in ("avx1024", "false", *([VERSIONS[0]] if missing and native.in_use() else [])):
        monkeypatch.setenv("MKOR_NATIVE", asked)
        with pytest.raises(ValueError, match=f"MKOR_NATIVE='{asked}' .* 0 .none."):
            native.loading._load()
