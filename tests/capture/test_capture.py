"""Which rows become vectors, and that they are the right ones, whatever the layer and the call.

Where rows are chosen (``rows=m``), a probe makes the choice visible: inputs are unit vectors, so a
right factor changes exactly those columns of the gradient whose rows it has seen, and all columns
of one chunk by the same amount.
"""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from mkor import MKOR
from oracles import window as oracles
from support.cases import GROUPED, convolution
from support.recording import Recorder, Twin, gradients, matrices

F64 = torch.float64


def wrapped(model, **how):
    how = {
        "rank": 8,
        "vectors": 3,
        "rows": None,
        "momentum": 0.9,
        "damping": 0.05,
        "rescale": None,
        "skip_output": False,
    } | how
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=how.pop("lr", 0.0)), **how)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------- rows all used


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolution(name):
    """Factors of their own for every group, or the raw gradient and a reason."""
    layer, images = convolution(name)
    model = nn.Sequential(layer, nn.Flatten(2), nn.LazyLinear(3, dtype=F64))
    model(images(1))
    optimizer, twin = wrapped(model), Twin(model, rank=8, vectors=3, momentum=0.9, damping=0.05)
    for n in (5, 4):
        optimizer.zero_grad()
        model(images(n)).tanh().square().mean().backward()
        raw = gradients(model)
        expected = twin.step(raw)["0"]
        optimizer.step()
        assert relative(gradients(model)["0"], expected) < 1e-10 or (
            torch.equal(gradients(model)["0"], raw["0"]) and "group" in str(optimizer.coverage())
        )


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("rows", [None, 2, 10**6])
def test_linear_inputs(shape, layout, rows):
    """Any number of dimensions and any strides, with all rows and with some."""
    x = torch.randn(*shape, 6, dtype=F64)
    if layout == "transposed" and len(shape) > 1:
        x = x.transpose(0, 1)
    if layout == "expanded" and shape:
        x = x[:1].expand_as(x)
    found = []
    for values in (x, x.clone(memory_format=torch.contiguous_format)):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
        optimizer = wrapped(model, rows=rows)
        model(values).cos().sum().backward()
        raw = gradients(model)["0"]
        optimizer.step()
        found.append(gradients(model)["0"])
        assert relative(found[-1], raw) > 1e-4
    assert relative(*found) < 1e-12


def test_keyword_input():
    """``layer(input=x)`` is a call like any other."""
    first, second = (nn.Linear(4, 3, dtype=F64) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x, found = torch.randn(5, 4, dtype=F64), []
    for layer, call in ((first, lambda: first(x)), (second, lambda: second(input=x))):
        optimizer = wrapped(layer)
        call().square().sum().backward()
        optimizer.step()
        found.append(layer.weight.grad)
    assert torch.equal(*found)
    assert relative(found[0], torch.zeros_like(found[0]) + first.weight.grad) == 0


def test_empty_batch_gives_no_vector():
    """A call without rows adds nothing, and breaks nothing."""
    model = nn.Sequential(nn.Linear(4, 3, dtype=F64))
    alone = copy.deepcopy(model)
    x, found = torch.randn(5, 4, dtype=F64), []
    for m, batches in ((model, [x, x[:0]]), (alone, [x])):
        optimizer = wrapped(m)
        sum(m(b).square().sum() for b in batches).backward()
        optimizer.step()
        found.append(m[0].weight.grad)
    assert torch.equal(*found)
    optimizer.zero_grad()
    alone(x[:0]).sum().backward()
    optimizer.step()
    assert (alone[0].weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_summed_in_float32(dtype):
    """A mean of thousands of low-precision rows keeps its digits."""
    model = nn.Sequential(nn.Linear(3, 2, dtype=dtype))
    recorder = Recorder(model)
    optimizer = wrapped(model, vectors=1, rank=1)
    x = 1 + torch.rand(9001, 3)
    model(x.to(dtype)).float().square().mean().backward()
    (statistics,) = (oracles.statistics(c, 1, True) for c in recorder.take()["0"])
    optimizer.step()
    entry = optimizer.state[model[0].weight]
    vectors = [t for t in entry.values() if torch.is_tensor(t) and t.shape == (1, 3)]
    assert vectors, "the window's rows are in optimizer.state"
    assert all(t.dtype == torch.float32 for t in vectors)
    assert any(relative(t[0].double(), statistics.a[0][:3]) < 1e-5 for t in vectors)


def test_autocast():
    """Under autocast the layers compute in bfloat16; factors follow, in float32."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1),
        nn.Flatten(), nn.Tanh(), nn.Linear(8, 8),
    )  # fmt: skip
    plain = copy.deepcopy(model)
    x = torch.randn(32, 8)
    for m, enabled in ((model, True), (plain, False)):
        optimizer = wrapped(m)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = m(x).float().square().mean()
            loss.backward()
            raw = m[0].weight.grad.clone()
            optimizer.step()
        assert relative(m[0].weight.grad, raw) > 0.1
        assert all(
            t.dtype in (torch.float32, torch.int64, torch.int8)
            for t in optimizer.state[m[0].weight].values()
        )
    found, expected = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain)
    )
    assert relative(found, expected) < 0.05


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_autocast_does_not_reach_the_statistics(kind):
    """Autocast would run a hook's own products in bfloat16: the vectors are float32 sums."""
    linear, dims = kind is nn.Linear, int(kind.__name__[4]) if kind is not nn.Linear else 0
    layer = kind(4, 3) if linear else kind(4, 3, 3, padding=1)
    model = nn.Sequential(layer)
    recorder = Recorder(model)
    optimizer = wrapped(model, vectors=1, rank=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(1 + torch.rand(5, 4, *(6,) * dims))
    out.float().square().mean().backward()
    (statistics,) = (oracles.statistics(c, 1, True) for c in recorder.take()["0"])
    optimizer.step()
    d = statistics.a[0].numel() - 1
    entry = optimizer.state[layer.weight]
    vectors = [
        v[0].double() for k, v in entry.items() if k.startswith("mkor") and v.shape == (1, d)
    ]
    assert any(relative(v, statistics.a[0][:d]) < 1e-5 for v in vectors)


# ------------------------------------------------------------------------------- rows chosen


def chunks_seen(raw, new):
    """Groups of columns that a right factor has changed by one amount each."""
    change = raw - new
    columns = [i for i in range(change.shape[1]) if change[:, i].norm() > 1e-9 * change.norm()]
    groups = []
    for i in columns:
        same = [group for group in groups if relative(change[:, i], change[:, group[0]]) < 1e-6]
        if same:
            same[0].append(i)
        else:
            groups.append([i])
    return groups


class Probe:
    """A layer whose inputs name their rows; ``chunks()`` takes a step and tells which were used."""

    def __init__(self, shape, *, vectors, rows, **how):
        self.shape = shape
        self.n = torch.Size(shape).numel()
        self.layer = nn.Linear(self.n, 5, bias=False, dtype=F64)
        self.optimizer = wrapped(
            self.layer, rank=vectors, vectors=vectors, rows=rows, sides="right", **how
        )

    def backward(self, first=0, n=None):
        x = torch.eye(self.n, dtype=F64)[first : first + (n or self.n)]
        x = x.reshape(*(self.shape if n is None else (n,)), self.n)
        out = self.layer(x)
        (out * (1 + torch.rand_like(out))).sum().backward()

    def step(self):
        raw = self.layer.weight.grad.clone()
        self.optimizer.step()
        seen = chunks_seen(raw, self.layer.weight.grad)
        self.optimizer.zero_grad()
        return seen

    def chunks(self):
        self.backward()
        return self.step()


@pytest.mark.parametrize(
    ("shape", "vectors", "rows"),
    [
        ((37,), 3, 5),
        ((40,), 1, 7),
        ((24,), 4, 6),
        ((25,), 4, 6),
        ((50,), 8, 1),
        ((4, 9), 2, 5),
        ((2, 3, 8), 3, 4),
    ],
    ids=str,
)
def test_chosen_rows(shape, vectors, rows):
    """Exactly ``k m`` rows, in ``k`` chunks of ``m`` neighbours, spread out and, in time, all."""
    probe = Probe(shape, vectors=vectors, rows=rows)
    visited = set()
    for _ in range(2 * probe.n):
        chunks = probe.chunks()
        assert len(chunks) == vectors
        for chunk in chunks:
            assert chunk == list(range(chunk[0], chunk[0] + rows))
        visited.update(row for chunk in chunks for row in chunk)
        starts = [chunk[0] for chunk in chunks]
        spread = [later - start for start, later in itertools.pairwise(starts)]
        assert all(abs(gap - probe.n / vectors) < rows + 1 for gap in spread)
    assert visited == set(range(probe.n))


@pytest.mark.parametrize(
    ("shape", "vectors", "rows", "sizes"),
    [
        ((11,), 3, 4, [4, 4, 3]),
        ((2, 5), 4, 3, [3, 3, 2, 2]),
        ((3,), 5, 2, [1, 1, 1]),
        ((7,), 2, 100, [4, 3]),
    ],
    ids=str,
)
def test_too_few_rows_for_the_chunks(shape, vectors, rows, sizes):
    """Fewer than ``k m`` rows are cut into ``k`` nearly equal runs of neighbours."""
    probe = Probe(shape, vectors=vectors, rows=rows)
    for _ in range(3):
        chunks = probe.chunks()
        assert [len(chunk) for chunk in chunks] == sizes
        assert [row for chunk in chunks for row in chunk] == list(range(probe.n))


def test_chosen_rows_depend_on_the_update_count_alone():
    """Two runs choose alike, and passes that do not count change nothing."""
    first, second = (Probe((37,), vectors=2, rows=4) for _ in range(2))
    expected = [first.chunks() for _ in range(12)]
    found = []
    for _ in range(12):
        second.backward()
        second.optimizer.zero_grad()
        with second.optimizer.no_capture():
            second.backward()
        second.optimizer.zero_grad()
        found.append(second.chunks())
    assert found == expected
    assert len({str(chunks) for chunks in expected}) >= 5  # 37 rows, 8 of them a step


def test_chosen_rows_move_with_updates_not_with_steps():
    """With ``update_every=3`` no position is left out."""
    probe = Probe((30,), vectors=2, rows=5, update_every=3)
    visited = set()
    for _ in range(3 * 12):
        visited.update(row for chunk in probe.chunks() for row in chunk)
    assert visited == set(range(30))


@pytest.mark.parametrize("update_every", [1, 2])
def test_rows_count_over_micro_batches(update_every):
    """``m`` rows in all: with two micro-batches a step, each gives half of every vector."""
    probe = Probe((48,), vectors=3, rows=4, update_every=update_every)
    for step in range(6 * update_every):
        probe.backward(0, 24)
        probe.backward(24, 24)
        chunks = probe.step()
        if step > update_every:  # the first may have to find out how many micro-batches there are
            assert [len(chunk) for chunk in chunks] == [4, 4, 4]
            for chunk in chunks:
                assert sum(row < 24 for row in chunk) == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(45,), (5, 9)], ids=str)
def test_vectors_and_squares_of_chosen_rows(side, shape):
    """Both factors and their damping come from the chosen rows, and from no others."""
    n, vectors, rows = 45, 3, 4
    probe = Probe(shape, vectors=vectors, rows=rows)
    model = nn.Sequential(nn.Linear(6, 5, dtype=F64))
    recorder = Recorder(model)
    optimizer = wrapped(model, rank=7, vectors=vectors, rows=rows, sides=side)
    twin = oracles.TwinLayer(
        rank=7, vectors=vectors, momentum=0.9, damping=0.05, bias=True, sides=side
    )
    for _ in range(5):
        chunks = probe.chunks()
        x = torch.randn(*shape, 6, dtype=F64) * torch.arange(1, n + 1).reshape(*shape, 1)
        model(x).square().mean().backward()
        (call,) = recorder.take()["0"][0]
        twin.history.append(oracles.chunk_statistics(call, chunks, bias=True))
        raw = gradients(model)["0"]
        optimizer.step()
        assert relative(gradients(model)["0"][0], twin.precondition(raw[0])) < 1e-10
        optimizer.zero_grad()


# ------------------------------------------------------------------------------- chosen images


def image_groups(n, vectors, rows, positions=(2, 3), steps=1):
    """For every step the groups of images whose patches made a vector."""
    layer = nn.Conv2d(n, 5, 1, bias=False, dtype=F64)
    optimizer = wrapped(layer, rank=vectors, vectors=vectors, rows=rows, sides="right")
    found = []
    for _ in range(steps):
        x = torch.eye(n, dtype=F64).reshape(n, n, 1, 1).expand(n, n, *positions)
        out = layer(x)
        (out * (1 + torch.rand_like(out))).sum().backward()
        raw = layer.weight.grad.clone()
        optimizer.step()
        found.append(chunks_seen(raw.flatten(1), layer.weight.grad.flatten(1)))
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("rows", "images"), [(6, (1,)), (1, (1,)), (12, (2,)), (18, (3,)), (8, (1, 2)), (10, (1, 2))]
)
def test_chosen_images(rows, images):
    """For convolutions a chunk is whole images, as many as bring about ``m`` rows."""
    visited = set()
    for groups in image_groups(13, 3, rows, steps=20):
        assert len(groups) == 3
        for group in groups:
            assert len(group) in images
            assert group == list(range(group[0], group[0] + len(group)))
        visited.update(image for group in groups for image in group)
    assert visited == set(range(13))


def test_too_few_images_for_the_chunks():
    """Fewer images than ``k`` chunks need are cut into ``k`` nearly equal runs."""
    assert image_groups(7, 3, 6 * 4) == [[[0, 1, 2], [3, 4], [5, 6]]]
    assert image_groups(2, 3, 6 * 4) == [[[0], [1]]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["conv2d-zeros-1", "conv2d-reflect-same", "conv1d-stride-dilation"]
)
def test_vectors_and_squares_of_chosen_images(name, side):
    """As for linear layers: patches of the chosen images, with their padding, and no others."""
    layer, images = convolution(name)
    model = nn.Sequential(layer)
    recorder = Recorder(model)
    n, vectors = 11, 3
    positions = layer(images(1)).flatten(2).shape[2]
    optimizer = wrapped(model, rank=7, vectors=vectors, rows=2 * positions, sides=side)
    twin = oracles.TwinLayer(
        rank=7, vectors=vectors, momentum=0.9, damping=0.05, bias=True, sides=side
    )
    for groups in image_groups(n, vectors, 2 * 6, steps=4):
        x = images(n) * torch.arange(1, n + 1, dtype=F64).reshape(n, *[1] * (images(1).dim() - 1))
        model(x).square().mean().backward()
        (call,) = recorder.take()["0"][0]
        chunks = [[i * positions + p for i in group for p in range(positions)] for group in groups]
        twin.history.append(oracles.chunk_statistics(call, chunks, bias=True))
        raw = gradients(model)["0"]
        optimizer.step()
        assert relative(gradients(model)["0"][0], twin.precondition(raw[0])) < 1e-10
        optimizer.zero_grad()


# ------------------------------------------------------------------------------- chosen lines


def line_groups(n, sizes, vectors, rows, steps):
    """For every step the groups of (image, line) whose patches made a vector."""
    lines = sizes[0]
    layer = CONV[len(sizes)](n * lines, 5, 1, bias=False, dtype=F64)
    optimizer = wrapped(layer, rank=vectors, vectors=vectors, rows=rows, sides="right")
    found = []
    for _ in range(steps):
        x = torch.eye(n * lines, dtype=F64).reshape(n, lines, n * lines, *[1] * (len(sizes) - 1))
        x = x.transpose(1, 2).expand(n, n * lines, *sizes)
        out = layer(x)
        (out * (1 + torch.rand_like(out))).sum().backward()
        raw = layer.weight.grad.clone()
        optimizer.step()
        groups = chunks_seen(raw.flatten(1), layer.weight.grad.flatten(1))
        found.append([[divmod(column, lines) for column in group] for group in groups])
        optimizer.zero_grad()
    return found


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize(
    ("sizes", "rows", "lines"),
    [((6, 3), 1, 1), ((6, 3), 2, 3), ((6, 3), 4, 5), ((9, 2, 2), 3, 3), ((30,), 4, 16)],
)
def test_chosen_lines(sizes, rows, lines):
    """Of a large image a chunk takes as many lines as hold ``4 m`` positions, all in turn."""
    n, visited, steps = 7, set(), 3 * sizes[0]
    for groups in line_groups(n, sizes, 3, rows, steps):
        assert len(groups) == 3
        starts = set()
        for group in groups:
            assert len({image for image, _ in group}) == 1
            starts.add(group[0][1])
            assert [line for _, line in group] == list(range(group[0][1], group[0][1] + lines))
        assert len(starts) == 1
        visited.update(place for group in groups for place in group)
    assert visited == set(itertools.product(range(n), range(sizes[0])))


def test_lines_of_neighbouring_updates_lie_far_apart():
    """A window holds a few updates; they should show it more than one height of the images."""
    starts = [groups[0][0][1] for groups in line_groups(4, (24, 4), 2, 1, steps=24)]
    assert sorted(starts) == list(range(24))
    for few in zip(*(starts[i:] for i in range(4)), strict=False):
        assert max(few) - min(few) >= 12


def test_every_image_meets_every_line():
    """Though both turns, of four images and of eight lines, share a factor."""
    visited = set()
    for groups in line_groups(8, (8, 4), 2, 1, steps=32):
        visited.update(place for group in groups for place in group)
    assert visited == set(itertools.product(range(8), range(8)))


class Padded(nn.Conv2d):
    """A convolution that pads in its own way, which its attributes do not tell."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 2, 1, 2)))


@pytest.mark.parametrize("size", [3, 26])
def test_convolutions_that_pad_themselves_keep_their_gradients(size):
    """Which rows made which output is not known; also where no patch would fit the image."""
    model = nn.Sequential(Padded(2, 3, 5, dtype=F64), nn.Flatten(), nn.LazyLinear(2, dtype=F64))
    x = torch.randn(6, 2, size, size, dtype=F64)
    model(x)
    optimizer = wrapped(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = model[0].weight.grad.clone()
        optimizer.step()
        assert torch.equal(model[0].weight.grad, before)
    assert optimizer.state[model[2].weight]["mkor_updates"] == 3


LINED = {
    "1d": ((40,), {"kernel_size": 5, "padding": 2}),
    "1d, far taps": ((40,), {"kernel_size": 3, "stride": 2, "dilation": 4, "padding": 3}),
    "2d": ((12, 5), {"kernel_size": 3, "padding": 1}),
    "2d, one tap": ((12, 5), {"kernel_size": 1}),
    "2d, strides": ((16, 7), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1)}),
    "2d, uneven": ((12, 5), {"kernel_size": (4, 2), "padding": "same"}),
    "2d, gaps": ((15, 4), {"kernel_size": 1, "stride": 3}),
    "2d, only padding": ((9, 5), {"kernel_size": 1, "padding": 3}),
    "2d, wide": ((12, 90), {"kernel_size": 3, "padding": 1}),
    "3d": ((9, 3, 2), {"kernel_size": 3, "padding": 1}),
}


def line_case(name, n):
    """A layer, its images, and the (images, output sizes) of one of them."""
    sizes, how = LINED[name]
    layer = CONV[len(sizes)](2, 4, **how, dtype=F64)
    x = torch.randn(n, 2, *sizes, dtype=F64) * torch.arange(1.0, sizes[0] + 1, dtype=F64).view(
        sizes[0], *[1] * (len(sizes) - 1)
    )
    with warnings.catch_warnings():  # torch says once that uneven "same" padding makes a copy
        warnings.simplefilter("ignore")
        outputs = layer(x[:1]).shape[2:]
    return layer, x, outputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LINED)
def test_vectors_and_squares_of_chosen_lines(name, side):
    """Patches under the chosen lines of the output, with their padding, and no others."""
    n, vectors, steps = 8, 3, 14
    layer, _, outputs = line_case(name, n)
    width = outputs[1:].numel()
    rows = max(1, width // 2)
    model = nn.Sequential(layer)
    recorder = Recorder(model)
    optimizer = wrapped(model, rank=7, vectors=vectors, rows=rows, sides=side)
    twin = oracles.TwinLayer(
        rank=7, vectors=vectors, momentum=0.9, damping=0.05, bias=True, sides=side
    )
    for groups in line_groups(n, tuple(outputs), vectors, rows, steps):
        _, x, _ = line_case(name, n)
        model(x).square().mean().backward()
        (call,) = recorder.take()["0"][0]
        chunks = [
            [i * outputs.numel() + line * width + p for i, line in group for p in range(width)]
            for group in groups
        ]
        assert len(chunks[0]) < outputs.numel()
        twin.history.append(oracles.chunk_statistics(call, chunks, bias=True))
        raw = gradients(model)["0"]
        optimizer.step()
        assert relative(gradients(model)["0"][0], twin.precondition(raw[0])) < 1e-10
        optimizer.zero_grad()


def test_images_that_are_not_padded_with_zeros_are_read_whole():
    """What is under an edge's patches then lies elsewhere in the image."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", dtype=F64))
    recorder = Recorder(model)
    optimizer = wrapped(model, rank=7, vectors=3, rows=2)
    twin = oracles.TwinLayer(rank=7, vectors=3, momentum=0.9, damping=0.05, bias=True)
    for step in range(4):
        model(torch.randn(3, 2, 9, 5, dtype=F64)).square().mean().backward()
        (call,) = recorder.take()["0"][0]
        chunks = [list(range(45 * image, 45 * image + 45)) for image in range(3)]
        twin.history.append(oracles.chunk_statistics(call, chunks, bias=True))
        raw = gradients(model)["0"]
        optimizer.step()
        assert relative(gradients(model)["0"][0], twin.precondition(raw[0])) < 1e-10, step
        optimizer.zero_grad()


def test_recorded_gradient_is_the_weight_gradient():
    """In a deep model with every kind of layer, our own rows give back what autograd found."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Linear(9, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 2),
    ).double()
    recorder = Recorder(model)
    wrapped(model)
    model(torch.randn(3, 2, 6, 6, dtype=F64)).square().mean().backward()
    for name, groups in recorder.take().items():
        layer = recorder.layers[name]
        bias = layer.bias is not None
        M = matrices(layer, layer.weight.grad, layer.bias.grad if bias else None)
        for found, expected in zip(groups, M, strict=True):
            torch.testing.assert_close(oracles.gradient(found, bias), expected)
