"""Calls that are not what their layer takes and makes, and passes that are not training's."""

import gc

import pytest
import torch
from torch import nn

from mkor import MKOR
from mkor.capture.hooks import GradientHook
from mkor.layers.sums import PartSums

pytestmark = pytest.mark.usefixtures("both_ways")


def wrapped(*layers, **how):
    model = nn.Sequential(*layers)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    how = {"rank": 8, "vectors": 4, "rows": 4, "skip_output": False} | how
    return model, MKOR(model, base, **how)


def linear(**how):
    return wrapped(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5), **how)


def captured(optimizer):
    """Rows of each layer that were captured since the last step."""
    batches = optimizer._preconditioner._watch.batches
    for batch in batches:
        batch.tray.empty()
    return [int(total) for batch in batches for total in batch.meta[:, 2]]


class FirstChannels(nn.Conv2d):
    def forward(self, x):
        return super().forward(x[:, : self.in_channels])


class Grey(nn.Conv2d):
    """Convolves one channel as if it were all."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.expand(-1, self.in_channels, -1, -1), weight, bias)


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize(("kind", "channels"), [(FirstChannels, 300), (Grey, 1)])
def test_other_channels_than_the_layers(kind, channels, rows):
    """The layer's matrix has other columns: its raw gradient passes."""
    model, optimizer = wrapped(kind(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), rows=rows)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, channels, 8, 8)).square().mean().backward()
        assert sorted(captured(optimizer)) == [0, 8 * 4 * 4]
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        changed = [not torch.equal(p.grad, g) for p, g in pairs]
        assert changed == [False, False, True, True]


@pytest.mark.parametrize(
    "change",
    [lambda m, a, y: y.repeat(400, 1, 1, 1), lambda m, a, y: y[:2], lambda m, a, y: y[:, :, 1:]],
    ids=["more", "fewer", "smaller"],
)
@pytest.mark.parametrize("rows", [4, None])
def test_hooks_that_change_the_output(change, rows):
    """Its rows are no longer those of the input."""
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(change)
    model, optimizer = wrapped(layer, rows=rows)
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    assert captured(optimizer) == [0]
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("like", ["nested", "sparse"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_no_dense_rows(like, dense_first):
    model, optimizer = wrapped(nn.Linear(30, 30), nn.Linear(30, 5))
    if dense_first:
        model(torch.randn(6, 30)).square().mean().backward()
    first = captured(optimizer)
    if like == "nested":
        parts = model(torch.nested.nested_tensor([torch.randn(2, 30), torch.randn(3, 30)])).unbind()
    else:
        parts = [model(torch.randn(6, 30).relu().to_sparse())]
    sum(part.square().mean() for part in parts).backward()
    second = captured(optimizer)
    rows = 6 * dense_first
    assert first == [rows, rows]
    # Only the first layer of the two sees a sparse input.
    assert second == [rows, rows + 6 * (like == "sparse")]
    optimizer.step()


def test_many_gradients_at_once_do_not_count():
    model, optimizer = linear()
    x = torch.randn(5, 30, requires_grad=True)
    one = torch.autograd.functional.jacobian(model, x)
    assert captured(optimizer) == [25 * 5, 25 * 5]
    optimizer.zero_grad()
    many = torch.autograd.functional.jacobian(model, x, vectorize=True)
    assert captured(optimizer) == [0, 0]
    torch.testing.assert_close(many, one)


def hooks():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is GradientHook]


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_inputs_do_not_outlive_the_pass(counts, retain, images):
    """Whoever keeps the loss keeps the graph and its hooks, but no activations."""
    if images:
        model, optimizer = wrapped(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))
        x = torch.randn(40, 3, 16, 16)
    else:
        model, optimizer = linear()
        x = torch.randn(600, 30)
    optimizer.step()
    before = {id(hook) for hook in hooks()}
    loss = model(x).square().mean()
    if counts:
        loss.backward(retain_graph=retain)
    else:
        with optimizer.no_capture():
            loss.backward(retain_graph=retain)
    found = [type(hook.a) for hook in hooks() if id(hook) not in before]
    assert len(found) == 2
    if retain and not counts:
        assert set(found) == {torch.Tensor}
    else:
        assert set(found) <= ({PartSums} if retain else {PartSums, type(None)})
    if retain:
        loss.backward()
        rows = [40 * 14 * 14, 40 * 12 * 12] if images else [600, 600]
        assert sorted(captured(optimizer)) == sorted(n * (1 + counts) for n in rows)
    assert loss.requires_grad
