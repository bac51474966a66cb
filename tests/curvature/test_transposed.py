"""GPT-2's ``Conv1D``, a linear layer whose weight is stored as ``[d_in, d_out]``."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from mkor import KFAC, MKOR, DenseMKOR, Eva


def chain(transposed: bool) -> nn.Sequential:
    """The same numbers in both ways of storing them; wide enough to be handled one by one."""
    torch.manual_seed(0)
    linears = [nn.Linear(5, 270), nn.Linear(270, 260), nn.Linear(260, 260), nn.Linear(260, 3)]
    layers = []
    for linear in linears:
        layer = linear.double()
        if transposed:
            layer = Conv1D(linear.out_features, linear.in_features).double()
            layer.weight.data.copy_(linear.weight.T)
            layer.bias.data.copy_(linear.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("rescale", ["running", None])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (MKOR, {"rank": 8, "vectors": 2}),
        (MKOR, {"sides": "left"}),
        (DenseMKOR, {"update_every": 1, "rule": "release"}),
        (KFAC, {"damping": 0.1, "kl_clip": None}),
        (Eva, {"kl_clip": None}),
    ],
)
def test_equals_linear_layers(kind, how, rescale):
    """Weights of any size, batched or one by one, train as the same linear layers do."""
    models = [chain(transposed) for transposed in (False, True)]
    optimizers = [
        kind(m, torch.optim.SGD(m.parameters(), lr=0.01), rescale=rescale, **how) for m in models
    ]
    for _ in range(4):
        x = torch.randn(40, 5, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        same = other if one.dim() == 1 else other.T
        torch.testing.assert_close(one, same, rtol=1e-7, atol=1e-10)
    rows = {row.parameter: row.preconditioned for row in optimizers[1].coverage()}
    assert [name for name, covered in rows.items() if not covered] == ["6.weight", "6.bias"]


class Allocated(TorchDispatchMode):
    """Operators that return a new tensor of one size."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tensors(args)}
        out = func(*args, **(kwargs or {}))
        if any(
            t.numel() == self.numel and t.untyped_storage().data_ptr() not in given
            for t in tensors(out)
        ):
            self.names.append(func.name())
        return out


def tensors(found):
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("transposed", [False, True])
def test_large_weights_are_handled_in_place(transposed):
    """No temporary of a gradient's size, whichever way the weight is stored."""
    model = chain(transposed)
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.01), rank=8, vectors=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(40, 5, dtype=torch.float64)).square().mean().backward()
        with Allocated(260 * 270) as allocated:
            optimizer.step()
    assert not allocated.names
