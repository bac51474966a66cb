"""The oracles checked by themselves: where their answer is known without them."""

import pytest
import torch
from torch import nn

from oracles import window as oracles
from support.cases import CONVOLUTIONS, convolution
from support.recording import Recorder, matrices


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_give_output_and_gradient(name):
    """``y = W a`` and ``M = g^T a`` hold for the brute-force rows of every convolution."""
    layer, images = convolution(name)
    recorder = Recorder(nn.Sequential(layer))
    out = layer(images(3))
    out.square().sum().backward()
    groups = recorder.take()["0"]
    M = matrices(layer, layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    W = matrices(layer, layer.weight, layer.bias)
    found = [oracles.gradient(calls, layer.bias is not None) for calls in groups]
    torch.testing.assert_close(torch.stack(found), M)
    a = torch.stack([calls[0][0] for calls in groups])
    a = a if layer.bias is None else oracles.with_ones(a)
    y = torch.einsum("gnpi,goi->ngop", a, W).flatten(1, 2)
    torch.testing.assert_close(y.reshape(out.shape), out)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_rows_give_gradient(shape, bias):
    layer = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    recorder = Recorder(nn.Sequential(layer))
    layer(torch.randn(*shape, 4, dtype=torch.float64)).square().sum().backward()
    ((call,),) = recorder.take()["0"]
    M = matrices(layer, layer.weight.grad, layer.bias.grad if bias else None)[0]
    torch.testing.assert_close(oracles.gradient([call], bias), M)


def test_statistics_by_hand():
    """Two calls of two and one samples in two slots: the second slot has one row."""
    calls = [
        (torch.tensor([[[1.0]], [[3.0]]]).double(), torch.tensor([[[1.0]], [[5.0]]]).double()),
        (torch.tensor([[[5.0]]]).double(), torch.tensor([[[2.0]]]).double()),
    ]
    found = oracles.statistics(calls, 2, bias=True)
    assert [v.tolist() for v in found.a] == [[3.0, 1.0], [3.0, 1.0]]
    assert [v.tolist() for v in found.g] == [[3 * 1.5], [3 * 5.0]]
    assert found.a_square == pytest.approx((1 + 9 + 25 + 3) / 6)
    assert found.g_square == pytest.approx(9 * (1 + 25 + 4) / 3)


def test_empty_slots_give_no_vector():
    a, g = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 5).double()
    found = oracles.statistics([(a, g)], 4, bias=False)
    assert len(found.a) == len(found.g) == 2


def test_all_rows_in_one_vector_are_the_bias_gradient():
    """For a mean loss ``g_bar`` is the sum of the raw ``g``, that is ``bias.grad``."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    recorder = Recorder(nn.Sequential(layer))
    layer(torch.randn(7, 4, dtype=torch.float64)).square().mean().backward()
    found = oracles.statistics(recorder.take()["0"][0], 1, bias=True)
    torch.testing.assert_close(found.g[0], layer.bias.grad)


def test_weights_of_the_window_sum_to_one_until_it_is_full():
    updates = [[torch.zeros(1)] * k for k in (1, 4, 2, 3)]
    everything = oracles.window_terms(updates, rank=10, gamma=0.9)
    assert sum(w for w, _ in everything) == pytest.approx(1.0)
    newest = oracles.window_terms(updates, rank=4, gamma=0.9)
    assert newest == everything[:4]
    assert [w for w, _ in newest] == pytest.approx([0.1 / 3 / 0.3439] * 3 + [0.09 / 2 / 0.3439])


def test_window_inverse_by_hand():
    """One update, one vector: along it the inverse is ``lambda / (lambda + |v|^2)``."""
    v = torch.tensor([3.0, 4.0]).double()
    inverse = oracles.window_inverse([[v]], [10.0], rank=3, gamma=0.9, damping=0.5)
    torch.testing.assert_close(inverse @ v, v * 5 / (5 + 25))
    across = torch.tensor([4.0, -3.0]).double()
    torch.testing.assert_close(inverse @ across, across)


def test_running_mean_forgets_its_start():
    assert oracles.running_mean([7.0], 0.9) == pytest.approx(7.0)
    assert oracles.running_mean([1.0, 2.0], 0.9) == pytest.approx((0.09 + 0.2) / 0.19)


@pytest.mark.parametrize("rescale", ["step", "running"])
def test_rescaling_keeps_the_norm_at_first(rescale):
    twin = oracles.TwinLayer(
        rank=4, vectors=2, momentum=0.9, damping=0.1, bias=True, rescale=rescale
    )
    twin.update([(torch.randn(5, 1, 3).double(), torch.randn(5, 1, 2).double())])
    M = torch.randn(2, 4).double()
    P = twin.precondition(M)
    assert P.norm().item() == pytest.approx(M.norm().item())
    second = twin.precondition(2 * M + 1).norm().item() / (2 * M + 1).norm().item()
    assert (second == pytest.approx(1.0)) == (rescale == "step")
