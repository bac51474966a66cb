"""Layers of all shapes share their small operations: each must fare as if it were alone."""

import copy
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mkor
from mkor.curvature.window import Window
from mkor.step import application
from mkor.step.batches import Batch

F64 = torch.float64
# Of odd order, so that shapes alternate, with and without a bias.
SIZES = [(6, 9), (9, 9), (9, 6), (6, 6), (6, 9), (9, 40), (40, 40), (40, 9), (9, 6), (6, 6)]


class Paths(nn.Module):
    """Layers of which each pass leaves some out; those that keep the width are skipped over."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*size, bias=i % 3 > 0, dtype=F64) for i, size in enumerate(SIZES)
        )

    def forward(self, x, left_out):
        for i, layer in enumerate(self.layers):
            if i not in left_out:
                x = torch.tanh(layer(x))
        return x


def names(model):
    return [f"layers.{i}" for i in range(len(model.layers))]


def trained(wrap, left_out, only=None, make=Paths):
    """Gradients as the base gets them, by step and layer, without moving the weights."""
    torch.manual_seed(0)
    model = make()
    skip = [] if only is None else [name for name in names(model) if name != only]
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = wrap(model, base, skip=skip, skip_output=False)
    torch.manual_seed(1)
    found = []
    for left in left_out:
        optimizer.zero_grad()
        model(torch.randn(24, 6, dtype=F64), left).square().sum().backward()
        optimizer.step()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[-1] = {name: grad.clone() for name, grad in found[-1].items()}
    return found


WRAPS = {
    "window": lambda *a, **k: mkor.MKOR(*a, rank=8, vectors=4, rows=2, **k),
    "left": lambda *a, **k: mkor.MKOR(*a, rank=8, vectors=4, rows=2, sides="left", **k),
    "step": lambda *a, **k: mkor.MKOR(*a, rank=8, vectors=4, rescale="step", **k),
    "seldom": lambda *a, **k: mkor.MKOR(*a, rank=8, vectors=4, update_every=2, **k),
    "float16": lambda *a, **k: mkor.MKOR(*a, rank=8, vectors=4, factor_dtype=torch.float16, **k),
    "dense": mkor.DenseMKOR,
    "kfac": lambda *a, **k: mkor.KFAC(*a, inverse_every=2, rescale="running", kl_clip=None, **k),
}
# First, in the middle, last; never the same.
GAPS = [(), (1,), (3, 6), (9,), (1, 3), (6, 9), (), (3, 9)]


UNREAD = ("window", "dense", "kfac")
"""One of each curvature also without reading masks, as on a GPU."""


@pytest.mark.parametrize(
    ("name", "read"), [*((name, True) for name in WRAPS), *((name, False) for name in UNREAD)]
)
def test_together_as_alone(name, read, monkeypatch):
    """In float64: the same products in other batches."""
    if not read:
        monkeypatch.setattr("mkor.linalg.basics.readable", lambda _: False)
    together = trained(WRAPS[name], GAPS)
    for layer in names(Paths()):
        alone = trained(WRAPS[name], GAPS, only=layer)
        for step, (all_of_them, one) in enumerate(zip(together, alone, strict=True)):
            for key in (key for key in one if key.startswith(f"{layer}.")):
                torch.testing.assert_close(
                    all_of_them[key], one[key], rtol=1e-9, atol=1e-12, msg=f"{key}, step {step}"
                )


class Beside(nn.Module):
    """Layers side by side, each on its own input."""

    def __init__(self, dtypes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 - i % 2, 6, dtype=d) for i, d in enumerate(dtypes))

    def forward(self, x, left_out):
        used = [i for i in range(len(self.layers)) if i not in left_out]
        return torch.cat([self.one(x, i).double() for i in used])

    def one(self, x, i):
        layer = self.layers[i]
        return layer(x[:, : layer.in_features].to(layer.weight.dtype) * (i + 1))


DTYPES = [F64, torch.float32, F64, torch.bfloat16, torch.float16, F64, torch.float32, torch.float32]


@pytest.mark.parametrize("order", [1, -1])
def test_rosters_do_not_mix(order):
    """Where one's used layers end at the place at which those of another begin, too."""
    dtypes = DTYPES[::order]
    # Each is used in half of the steps; all pairs of ends and beginnings occur.
    ways = [tuple(i for i in range(8) if step >> i & 1) for step in range(0, 255, 5)]
    together = trained(WRAPS["window"], ways, make=lambda: Beside(dtypes))
    for layer in range(8):
        alone = trained(WRAPS["window"], ways, f"layers.{layer}", make=lambda: Beside(dtypes))
        for step, (all_of_them, one) in enumerate(zip(together, alone, strict=True)):
            for key in (key for key in one if key.startswith(f"layers.{layer}.")):
                distance = (all_of_them[key] - one[key]).double().norm()
                least = 1e-9 if one[key].dtype == F64 else 1e-3
                assert distance <= least * one[key].double().norm(), (key, step)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(widths):
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in pairwise(widths)]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 3))
    optimizer = mkor.MKOR(model, torch.optim.SGD(model.parameters(), lr=0.01), rank=8, vectors=4)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, widths[0])).square().sum().backward()
        with Calls() as calls:
            optimizer.step()
    return calls.found


def test_shapes_share_what_is_no_product(without_kernels):
    one, many = calls_of_a_step([8, 8]), calls_of_a_step([8, 8, 9, 10, 11, 12])
    shared = [
        "aten.linalg_cholesky_ex.default",
        "aten.remainder.Scalar",
        "aten.lerp.Scalar",
        "aten.scatter_.value",
        "aten._foreach_copy_.default",
        "aten._foreach_norm.Scalar",
        "aten.where.self",
    ]
    for name in shared:
        assert many[name] <= one[name], name
        assert one[name] > 0, name
    # All that is left to a shape: its products, its rings, its views.
    assert (many.total() - one.total()) / 4 < 0.65 * one.total()


def test_layers_that_are_left_out_say_nothing():
    """Not by a norm that was infinite when they were last used."""
    torch.manual_seed(0)
    model = Paths()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = WRAPS["window"](model, base, skip_output=False)
    last = model.layers[9]
    weights = copy.deepcopy(model.state_dict())
    for left in [(), (), (9,), (9,)]:
        model.load_state_dict(weights)
        optimizer.zero_grad()
        model(torch.randn(24, 6, dtype=F64), left).square().sum().backward()
        if last.weight.grad is not None:
            last.weight.grad.fill_(torch.inf)
        optimizer.step()
    updates = [int(optimizer.state[layer.weight]["mkor_updates"]) for layer in model.layers]
    assert updates == [2] * 9 + [0]


def test_layers_that_are_left_out_do_not_count_for_the_clip():
    lr = 0.5
    options = {"rank": 8, "vectors": 4, "rescale": None, "skip_output": False}

    def gradients(kl_clip, left_out):
        torch.manual_seed(0)
        model = Paths()
        base = torch.optim.SGD(model.parameters(), lr=lr)
        optimizer = mkor.MKOR(model, base, kl_clip=kl_clip, **options)
        torch.manual_seed(1)
        for left in left_out:
            weights = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            model(torch.randn(24, 6, dtype=F64), left).square().sum().backward()
            used = [p for p in model.parameters() if p.grad is not None]
            raw = [p.grad.clone() for p in used]
            optimizer.step()
            for p, weight in zip(model.parameters(), weights, strict=True):
                p.data.copy_(weight)
        return raw, [p.grad for p in used]

    for gaps in (GAPS[:2], GAPS[:3], GAPS):
        raw, free = gradients(None, gaps)
        total = sum(float((p * m).sum()) for p, m in zip(free, raw, strict=True))
        _, clipped = gradients(0.25 * lr**2 * total, gaps)
        for found, p in zip(clipped, free, strict=True):
            torch.testing.assert_close(found, 0.5 * p)


def test_few_matrices_are_factored_together(monkeypatch):
    """However many there are, not all of a net's at a time."""
    together = trained(WRAPS["window"], GAPS)
    monkeypatch.setattr("mkor.curvature.window.TOGETHER", 500)
    apart = trained(WRAPS["window"], GAPS)
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        for key, grad in one.items():
            torch.testing.assert_close(other[key], grad, rtol=1e-9, atol=1e-12)


def test_whitened_vectors_go_with_their_products(monkeypatch):
    """They are as large as the factors: at most those of one shape live at a time."""
    made, alive = [], []
    whiten, finish = Window._whiten, application._finish

    def watched_whiten(*args):
        alive.append(sum(tensor() is not None for tensor in made))
        found = whiten(*args)
        made.extend(weakref.ref(rows) for rows in found.values())
        return found

    def watched_finish(*args):
        alive.append(sum(tensor() is not None for tensor in made))
        finish(*args)

    monkeypatch.setattr(Window, "_whiten", watched_whiten)
    monkeypatch.setattr(application, "_finish", watched_finish)
    trained(WRAPS["window"], [()] * 3)
    # Left, right and bias.
    assert len(made) > 3 * 2 * 3
    assert max(alive) <= 3


def test_refused_updates_are_those_of_the_layers():
    """The output layer's, which was watched in the first pass, is not among them."""
    torch.manual_seed(0)
    model = Paths()
    optimizer = WRAPS["window"](model, torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(24, 6, dtype=F64)
    x[3] = torch.nan
    model(x, ()).square().sum().backward()
    optimizer.step()
    figures = optimizer.diagnostics()
    layers = [value for key, value in figures.items() if key.endswith("/refused_updates")]
    assert figures["mkor/refused_updates"] == 9 == sum(layers) - 9


def test_covariances_are_made_one_after_the_other(monkeypatch):
    """They are as large as the factors."""
    made, alive = [], []
    statistics = Batch.statistics

    def watched(*args):
        alive.append(sum(tensor() is not None for tensor in made))
        found = statistics(*args)
        made.extend(weakref.ref(tensor) for tensor in found.covariance.values())
        return found

    monkeypatch.setattr(Batch, "statistics", watched)
    trained(WRAPS["kfac"], [()] * 2)
    # Left and right, of the one before.
    assert len(made) > 2 * 2 * 3
    assert max(alive) <= 2
