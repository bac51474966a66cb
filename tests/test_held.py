"""Tensors that are kept until the backward pass ends: the same sums, later, and nothing longer."""

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mkor import MKOR
from mkor.capture.hooks import GradientHook
from mkor.capture.tray import Tray
from mkor.layers.sums import PartSums

F64 = torch.float64


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Linear layers of any size are kept, as convolutions are."""
    monkeypatch.setattr("mkor.capture.gate.SMALL", 1 << 30)


def linear():
    layers = [nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)]
    return nn.Sequential(*layers).to(F64), torch.randn(500, 40, dtype=F64)


def tokens():
    model, x = linear()
    return model, x.view(20, 25, 40)


def images():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 49, 2)).to(F64), torch.randn(
        40, 3, 16, 16, dtype=F64
    )


def alike():
    """Convolutions of one shape, of whose images only a few lines are used."""
    layers = [nn.Conv2d(3, 6, 3, padding=1)]
    for _ in range(3):
        layers += [nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 256, 2)).to(F64), torch.randn(
        40, 3, 16, 16, dtype=F64
    )


def repeated():
    layer = nn.Linear(40, 40)
    layers = [layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(40, 2)]
    return nn.Sequential(*layers).to(F64), torch.randn(500, 40, dtype=F64)


MAKES = [linear, tokens, images, alike, repeated]


def factors(make, passes, retain=False, rows=8, dtype=F64):
    torch.manual_seed(0)
    model, x = make()
    model, x = model.to(dtype), x.to(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = MKOR(model, base, rank=8, vectors=4, rows=rows, skip_output=False)
    for _ in range(3):
        optimizer.zero_grad()
        for part in x.chunk(passes):
            loss = model(part).square().mean()
            if retain:
                loss.backward(retain_graph=True)
            loss.backward()
        optimizer.step()
    return [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("rows", [8, None])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("retain", [False, True], ids=["", "retain"])
@pytest.mark.parametrize("make", MAKES)
def test_the_same_as_if_nothing_were_kept(make, retain, passes, rows, monkeypatch):
    """Also where a graph is used twice, and a layer is called twice."""
    kept = factors(make, passes, retain, rows)
    monkeypatch.setattr("mkor.capture.gate.HELD", 0)
    for found, expected in zip(kept, factors(make, passes, retain, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("make", MAKES)
def test_the_same_in_float32(make):
    """Where kernels sum some calls at once, and others are kept."""
    for rows in (8, None):
        found = factors(make, passes=3, rows=rows, dtype=torch.float32)
        for p, q in zip(found, factors(make, passes=3, rows=rows), strict=True):
            assert (p.double() - q.double()).norm() <= 1e-4 * q.double().norm()


def test_kept_up_to_a_limit(monkeypatch):
    """What would be too much is summed at once; the next pass may keep as much again."""
    kept = []
    monkeypatch.setattr("mkor.capture.gate.HELD", 2 * 500 * 40)
    original = Tray.put

    def noting(tray, call):
        kept.append(isinstance(call.sides[1], torch.Tensor))
        original(tray, call)

    monkeypatch.setattr(Tray, "put", noting)
    model, x = linear()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    for _ in range(2):
        kept.clear()
        model(x).square().mean().backward()
        # The output layer's 500 * 43 entries come first; then there is no room for 500 * 80.
        assert kept == [True, False, False]
    optimizer.step()


@pytest.mark.parametrize(("sides", "left"), [("both", PartSums), ("left", type(None))])
def test_inputs_do_not_outlive_the_pass(sides, left):
    """A loss keeps its graph alive, and with it the hooks, but no activations."""
    gc.collect()
    model, x = linear()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = MKOR(model, base, sides=sides, skip_output=False)
    optimizer.step()
    loss = model(x).square().mean()
    loss.backward()
    hooks = [each for each in gc.get_objects() if type(each) is GradientHook]
    assert len(hooks) == 3
    assert all(type(hook.a) is left for hook in hooks)
    assert loss.requires_grad


class Between(nn.Module):
    """Layers of one shape before and after a checkpoint, whose own has another."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(40, 40, dtype=F64), nn.Linear(40, 40, dtype=F64)
        self.middle, self.reentrant = nn.Linear(40, 40, bias=False, dtype=F64), reentrant

    def forward(self, x):
        x = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(x)


def test_a_pass_inside_a_pass():
    """Reentrant checkpointing ends a pass in the midst of another, which then goes on."""

    def make(reentrant):
        return Between(reentrant), torch.randn(64, 40, dtype=F64)

    inside, plain = (factors(partial(make, reentrant), passes=1) for reentrant in (True, False))
    for found, expected in zip(inside, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dropped_in_mid_pass():
    """What comes after counts, whoever dropped what came before."""
    model, x = linear()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = MKOR(model, base, rank=8, vectors=4, rows=8, skip_output=False)
    optimizer.step()
    model[2].register_full_backward_hook(lambda *_: optimizer._preconditioner.forget())
    model(x).square().mean().backward()
    optimizer.step()
    updates = [int(optimizer.state[model[i].weight]["mkor_updates"]) for i in (0, 4)]
    assert updates == [1, 0]


def test_gradients_that_are_differentiated_again():
    """Sums hold no graph, though gradients that were kept do."""
    model, x = linear()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    loss = model(x).square().mean()
    torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert not any(batch.a.requires_grad for batch in optimizer._preconditioner._watch.batches)
    assert not any(batch.g.requires_grad for batch in optimizer._preconditioner._watch.batches)


class Overwriting(torch.autograd.Function):
    """Changes what it returned in its backward pass, as in-place activations do."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.clone()
        return ctx.y

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            ctx.y.fill_(1e6)
        return grad


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(40, 40, dtype=F64), nn.Linear(40, 40, dtype=F64)

    def forward(self, x):
        return self.last(Overwriting.apply(self.first(x)))


def test_inputs_that_the_backward_pass_changes():
    """The pass in which this is seen teaches that layer nothing; later ones keep no tensors."""
    torch.manual_seed(0)
    model = Overwritten()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = MKOR(model, base, rank=8, vectors=4, rows=8, skip_output=False)
    x = torch.randn(100, 40, dtype=F64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    entry = optimizer.state[model.last.weight]
    assert entry["mkor_updates"] == 2
    assert entry["mkor_right_rows"].abs().max() < 10


def convolutions(*pairs):
    """Two convolutions of one matrix's shape, whose patches differ."""
    first, second = (nn.Conv2d(6, 6, **how, dtype=F64) for how in pairs)
    model = nn.Sequential(nn.Conv2d(3, 6, 1, dtype=F64), first, nn.Tanh(), second, nn.Flatten())
    return nn.Sequential(*model, nn.LazyLinear(2, dtype=F64)), torch.randn(24, 3, 9, 9, dtype=F64)


@pytest.mark.parametrize(
    "pairs",
    [
        ({"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}),
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 2, "dilation": 2}),
        (
            {"kernel_size": 3, "padding": 1},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        ),
    ],
    ids=["factorised", "dilated", "padded"],
)
def test_neighbours_of_one_shape_and_other_patches(pairs, monkeypatch):
    """Layers of one batch are only summed together if they read their inputs alike."""

    def make():
        model, x = convolutions(*pairs)
        model(x)
        return model, x

    kept = factors(make, passes=1)
    monkeypatch.setattr("mkor.capture.gate.HELD", 0)
    for found, expected in zip(kept, factors(make, passes=1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Scaling(nn.Linear):
    """Autograd keeps what it multiplies, not what it is given."""

    def forward(self, x):
        return super().forward(2 * x)


class Residual(nn.Module):
    def __init__(self, kind, in_place):
        super().__init__()
        self.layer, self.in_place = kind(40, 40, dtype=F64), in_place

    def forward(self, x):
        x = x * 1.0
        if self.in_place:
            x += self.layer(x)
            return x
        return x + self.layer(x)


def test_an_input_that_autograd_does_not_keep_may_change():
    """A layer that transforms its input first leaves it free for an addition in place."""
    ends = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Residual(Scaling, in_place), Residual(Scaling, in_place))
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = MKOR(model, base, rank=8, vectors=4, rows=8, skip_output=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(60, 40, dtype=F64)).square().mean().backward()
            optimizer.step()
        ends.append([t for p in model.parameters() for t in (p, *optimizer.state[p].values())])
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Linear, Scaling])
def test_a_forward_pass_alone_leaves_nothing(kind):
    """Without a backward pass the hooks go with the graph: no cycle keeps an activation."""
    model = nn.Sequential(Residual(kind, in_place=kind is Scaling), nn.Linear(40, 2, dtype=F64))
    MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    gc.collect()
    for _ in range(3):
        model(torch.randn(60, 40, dtype=F64))
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is GradientHook]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_in_place_activations_after_layers_on_sequences(bias, in_place):
    """The output is a view where there is a bias; an activation in place replaces its node."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=bias), nn.ReLU(inplace=in_place), nn.Linear(8, 3, bias=bias)]
    model = nn.Sequential(*layers).to(F64)
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 7, 8, dtype=F64)).square().mean().backward()
        optimizer.step()
    assert [int(optimizer.state[model[i].weight]["mkor_updates"]) for i in (0, 2)] == [3, 3]


def test_an_output_that_another_hook_cuts_off():
    """A hook before the wrapper's may return a leaf, which has no node to hang on."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 3, dtype=F64))
    model[0].register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    model(torch.randn(5, 8, dtype=F64)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[model[2].weight]["mkor_updates"] == 1


def test_an_output_that_another_hook_narrows():
    """Such a call is not its layer's, and teaches it nothing."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=F64), nn.Tanh(), nn.Linear(4, 3, dtype=F64))
    model[0].register_forward_hook(lambda *call: call[-1][:, :4])
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_output=False)
    model(torch.randn(5, 8, dtype=F64)).square().mean().backward()
    optimizer.step()
    updates = [int(optimizer.state[model[i].weight]["mkor_updates"]) for i in (0, 2)]
    assert updates == [0, 1]


def test_sums_of_squares_slab_by_slab(monkeypatch):
    """However few entries are squared at a time."""
    whole = factors(images, passes=1, rows=None)
    monkeypatch.setattr("mkor.layers.patches.SLAB", 1000)
    for found, expected in zip(factors(images, passes=1, rows=None), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
