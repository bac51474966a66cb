"""Layers of all shapes share their small operations: each must fare as if it were alone."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mkor

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


@pytest.mark.parametrize("name", WRAPS)
def test_together_as_alone(name):
    """In float64: the same products in other batches."""
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


def test_a_shape_of_its_own_costs_little_more_than_its_products():
    """All that is left to a shape: its products, its part of the state, its views."""
    one, many = calls_of_a_step([8, 8]), calls_of_a_step([8, 8, 9, 10, 11, 12])
    assert many["aten.linalg_cholesky_ex.default"] <= one["aten.linalg_cholesky_ex.default"]
    assert (many.total() - one.total()) / 4 < 80


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


class Temporary(TorchDispatchMode):
    """The most memory that was taken inside, beside what is kept."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for t in tensors(result):
            storage = t.untyped_storage()
            if storage.data_ptr() not in given:
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


LARGE = {
    "window": lambda *a, **k: mkor.MKOR(*a, rank=16, vectors=4, **k),
    "kfac": mkor.KFAC,
    "dense": lambda *a, **k: mkor.DenseMKOR(*a, update_every=1, **k),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_step_needs_no_more_memory_with_more_layers(name):
    """What is as large as the factors, whitened vectors and covariances, is made of few at a time.

    Only what is as small as the rank, or one vector of a layer, exists of all layers at once.
    """

    def most(layers):
        torch.manual_seed(0)
        sizes = [(400 + i, 401 + i) for i in range(layers)]
        model = nn.Sequential(*(nn.Linear(*size, dtype=F64) for size in sizes))
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = LARGE[name](model, base, skip_output=False)
        for _ in range(2):
            model(torch.randn(24, 400, dtype=F64)).square().mean().backward()
            optimizer.step()
        model(torch.randn(24, 400, dtype=F64)).square().mean().backward()
        with Temporary() as temporary:
            optimizer.step()
        return temporary.most

    large = 8 * 400 * (2 * 16 if name == "window" else 400)
    assert most(12) - most(4) < 8 * 0.5 * large
