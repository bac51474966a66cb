"""Calls that are not what their layer takes and makes, and passes that are not training's."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mkor import KFAC, MKOR
from support.contestants import factors

F64 = torch.float64
WINDOW = {"rank": 8, "vectors": 4, "rows": 4, "skip_output": False}


def wrapped(*layers, kind=MKOR, lr=1e-3, **how):
    model = nn.Sequential(*layers)
    base = torch.optim.SGD(model.parameters(), lr=lr)
    defaults = WINDOW if kind is MKOR else {"skip_output": False, "damping": 0.1}
    return model, kind(model, base, **(defaults | how))


def linear(**how):
    return wrapped(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5), **how)


def updates(model, optimizer):
    """How many updates each layer has learned from."""
    return [int(optimizer.state[p]["mkor_updates"]) for p in model.parameters() if p.dim() > 1]


def close(one, other):
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class FirstChannels(nn.Conv2d):
    def forward(self, x):
        return super().forward(x[:, : self.in_channels])


class Grey(nn.Conv2d):
    """Convolves one channel as if it were all."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.expand(-1, self.in_channels, -1, -1), weight, bias)


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize(("kind", "channels"), [(FirstChannels, 300), (Grey, 1)])
def test_a_layer_with_other_columns_than_its_input_passes_raw(kind, channels, rows):
    model, optimizer = wrapped(kind(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), rows=rows)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, channels, 8, 8)).square().mean().backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        assert [torch.equal(p.grad, g) for p, g in pairs] == [True, True, False, False]
    assert updates(model, optimizer) == [0, 3]


@pytest.mark.parametrize(
    "change",
    [lambda m, a, y: y.repeat(400, 1, 1, 1), lambda m, a, y: y[:2], lambda m, a, y: y[:, :, 1:]],
    ids=["more", "fewer", "smaller"],
)
@pytest.mark.parametrize("rows", [4, None])
def test_an_output_that_a_hook_changes_is_not_captured(change, rows):
    """Its rows are no longer those of the input."""
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(change)
    model, optimizer = wrapped(layer, rows=rows)
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert updates(model, optimizer) == [0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("narrowed", [False, True])
def test_an_output_that_a_hook_replaces_leaves_the_rest_alone(narrowed):
    """By a leaf, which has no node of the autograd graph to hang on, or by a part of it."""
    first = nn.Linear(8, 8)
    first.register_forward_hook(
        lambda *call: call[-1][:, :4] if narrowed else call[-1].detach().requires_grad_()
    )
    model, optimizer = wrapped(first, nn.Tanh(), nn.Linear(4 if narrowed else 8, 3))
    model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    found = updates(model, optimizer)
    assert found[1] == 1
    assert found[0] == 0 or not narrowed


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("like", ["nested", "sparse"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_no_dense_rows_are_not_captured(like, dense_first):
    def steps(odd):
        torch.manual_seed(0)
        model, optimizer = wrapped(nn.Linear(30, 30), nn.Linear(30, 5))
        dense, sparse = torch.randn(6, 30), torch.randn(6, 30).relu()
        if dense_first:
            model(dense).square().mean().backward()
        if odd:
            few = [torch.randn(2, 30), torch.randn(3, 30)]
            parts = (
                model(torch.nested.nested_tensor(few)).unbind()
                if like == "nested"
                else [model(sparse.to_sparse())]
            )
            sum(part.square().mean() for part in parts).backward()
        optimizer.step()
        return updates(model, optimizer), optimizer.state[model[0].weight]["mkor_right_rows"]

    (found, rows), (_, expected) = steps(odd=True), steps(odd=False)
    # Only the first layer of the two sees a sparse input.
    assert found == [dense_first, dense_first or like == "sparse"]
    if dense_first:
        assert rows.any() == expected.any()


def test_many_gradients_at_once_do_not_count():
    x = torch.randn(5, 30, requires_grad=True)
    found = []
    for vectorize in (False, True):
        torch.manual_seed(0)
        model, optimizer = linear()
        found.append(torch.autograd.functional.jacobian(model, x, vectorize=vectorize))
        optimizer.step()
        assert updates(model, optimizer) == [int(not vectorize)] * 2
    torch.testing.assert_close(*found)


def test_gradients_without_memory():
    """That of ``sgn`` is a tensor of zeros without an address."""
    model, optimizer = linear()
    torch.sgn(model(torch.randn(64, 30))).backward(torch.ones(64, 5))
    optimizer.step()
    assert not model[0].weight.grad.any()


def test_statistics_hold_no_graph():
    """Gradients that are to be differentiated again do."""
    model, optimizer = wrapped(nn.Linear(30, 30, dtype=F64), nn.Linear(30, 5, dtype=F64))
    loss = model(torch.randn(50, 30, dtype=F64)).square().mean()
    parameters = list(model.parameters())
    for p, g in zip(
        parameters, torch.autograd.grad(loss, parameters, create_graph=True), strict=True
    ):
        p.grad = g.detach()
    optimizer.step()
    assert updates(model, optimizer) == [1, 1]
    assert not any(factor.requires_grad for factor in factors(optimizer))


# ------------------------------------------------------------------------- what outlives a pass


class Watch(list):
    """The memory of a layer's inputs, held weakly."""

    def __init__(self, layer):
        layer.register_forward_pre_hook(
            lambda _, inputs: self.append(StorageWeakRef(inputs[0].untyped_storage()))
        )

    def alive(self):
        assert self
        return [each for each in self if not each.expired()]


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_inputs_do_not_outlive_the_pass(counts, retain, images, sides):
    """Whoever keeps the loss keeps the graph and its hooks, but no activations."""
    if images:
        layers, x = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)], torch.randn(40, 3, 16, 16)
    else:
        layers, x = [nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5)], torch.randn(600, 30)
    model, optimizer = wrapped(*layers, sides=sides)
    optimizer.step()
    seen = Watch(model[2])
    loss = model(x).square().mean()
    if counts:
        loss.backward(retain_graph=retain)
    else:
        with optimizer.no_capture():
            loss.backward(retain_graph=retain)
    if retain:
        assert seen.alive()
        loss.backward()  # counts
    assert not seen.alive()
    optimizer.step()
    assert updates(model, optimizer) == [int(counts or retain)] * 2
    assert loss.requires_grad


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


@pytest.mark.parametrize("kind", [nn.Linear, Scaling])
def test_a_forward_pass_alone_leaves_nothing(kind):
    """Without a backward pass the hooks go with the graph: no cycle keeps an activation."""
    model, _ = wrapped(Residual(kind, in_place=kind is Scaling), nn.Linear(40, 2, dtype=F64))
    seen = Watch(model[1])
    gc.collect()
    gc.disable()
    try:
        model(torch.randn(60, 40, dtype=F64))
        assert not seen.alive()
    finally:
        gc.enable()


# ------------------------------------------------------------------------------ changed in place


@pytest.mark.parametrize("kind", [MKOR, KFAC])
def test_an_input_that_autograd_does_not_keep_may_change(kind):
    """A layer that transforms its input first leaves it free for an addition in place."""
    ends = []
    for in_place in (True, False):
        torch.manual_seed(0)
        layers = [Residual(Scaling, in_place) for _ in range(2)]
        model, optimizer = wrapped(*layers, kind=kind, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(60, 40, dtype=F64)).square().mean().backward()
            optimizer.step()
        ends.append([*model.parameters(), *factors(optimizer)])
    close(*ends)


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


def test_an_input_that_the_backward_pass_changes_is_not_learned():
    """Nothing is learned from the new values; at most the pass that shows it teaches nothing."""
    torch.manual_seed(0)
    model, optimizer = wrapped(Overwritten(), lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(100, 40, dtype=F64)).square().mean().backward()
        optimizer.step()
    entry = optimizer.state[model[0].last.weight]
    assert entry["mkor_updates"] >= 2
    assert entry["mkor_right_rows"].abs().max() < 10


@pytest.mark.parametrize("bias", [True, False])
def test_in_place_activations_after_layers_on_sequences(bias):
    """The output is a view where there is a bias; an activation in place replaces its node."""
    ends = []
    for in_place in (True, False):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8, bias=bias), nn.ReLU(inplace=in_place), nn.Linear(8, 3, bias=bias)]
        model, optimizer = wrapped(*(layer.to(F64) for layer in layers))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 7, 8, dtype=F64)).square().mean().backward()
            optimizer.step()
        assert updates(model, optimizer) == [3, 3]
        ends.append([*model.parameters(), *factors(optimizer)])
    close(*ends)


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
    ends = []
    for reentrant in (True, False):
        torch.manual_seed(0)
        model, optimizer = wrapped(Between(reentrant))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(64, 40, dtype=F64)).square().mean().backward()
            optimizer.step()
        ends.append([*model.parameters(), *factors(optimizer)])
    close(*ends)


@pytest.mark.parametrize("rows", [None, 10**6])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_graph_that_is_used_twice_counts_twice(passes, rows):
    """The mean of its rows is the same; gradients of half the size each add up to the same."""
    ends = []
    for twice in (True, False):
        torch.manual_seed(0)
        layers = nn.Linear(40, 40, dtype=F64), nn.Linear(40, 3, dtype=F64)
        model, optimizer = wrapped(*layers, vectors=1, rows=rows)
        for _ in range(3):
            optimizer.zero_grad()
            for x in torch.randn(60, 40, dtype=F64).chunk(passes):
                loss = model(x).square().mean()
                if twice:
                    (loss / 2).backward(retain_graph=True)
                    (loss / 2).backward()
                else:
                    loss.backward()
            optimizer.step()
        ends.append([*model.parameters(), *factors_of_inputs(optimizer, model)])
    close(*ends)


def factors_of_inputs(optimizer, model):
    return [optimizer.state[layer.weight]["mkor_right_rows"] for layer in model]
