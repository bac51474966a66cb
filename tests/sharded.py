"""What processes find of layers that ``fully_shard`` cut, and of layers that something else did."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers.pytorch_utils import Conv1D

from mkor.communication.sharding import check_sharding, local, reshard, shard_of
from mkor.curvature.contract import SIDES, BatchShape
from mkor.curvature.dense import DenseInverse
from mkor.curvature.eva import RankOne
from mkor.curvature.kfac import Covariance
from mkor.curvature.window import Window
from test_blocks import learned

# ---------------------------------------------------------------------------------------- models


class Net(nn.Module):
    """Seventeen outputs, one, none of the bias, a convolution, and GPT-2's layer."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(6, 17)
        self.narrow = nn.Linear(17, 1)
        self.plain = nn.Linear(6, 12, bias=False)
        self.conv = nn.Conv2d(6, 5, (2, 3))
        self.turned = nn.Sequential(Conv1D(13, 6), nn.Tanh())
        self.even = nn.Sequential(Conv1D(12, 6), nn.Tanh())

    def forward(self, x):
        image = x.view(-1, 6, 1, 1).expand(-1, -1, 3, 4)
        return (
            self.narrow(self.wide(x)).sum()
            + self.plain(x).square().sum()
            + self.conv(image).square().sum()
            + self.turned(x).sum()
            + self.even(x).sum()
        )


FIRST = ("wide", "plain", "conv", "turned.0", "narrow")
SECOND = ("plain", "conv", "even.0")
"""What can be cut along its second dimension."""
TURNED = ("turned.0", "even.0")


def second(parameter):
    return Shard(1) if parameter.dim() > 1 else Shard(0)


def trained(names=FIRST, dtype=torch.float64, **how):
    """A sharded model with gradients, every layer a group of its own."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    for name in names:
        fully_shard(net.get_submodule(name.removesuffix(".0")), **how)
    fully_shard(net, **{k: v for k, v in how.items() if k != "shard_placement_fn"})
    torch.manual_seed(1 + dist.get_rank())
    net(torch.randn(4, 6, dtype=dtype)).backward()
    return net


def mesh(place, shape):
    names = ("replicate", "shard")
    return init_device_mesh("cpu", shape, mesh_dim_names=names) if shape else None


def matrix(tensor, transposed):
    tensor = tensor.detach().flatten(1)
    return tensor.mT.contiguous() if transposed else tensor


def numbers(part):
    return [part.start, part.stop]


def told(net, names):
    """Of every layer: which block the shard says is here, what is here, and what is everywhere."""
    found = {}
    for name in names:
        layer = net.get_submodule(name)
        weight, bias, turned = layer.weight, layer.bias, name in TURNED
        shard = shard_of(weight, bias, turned)
        block, whole = shard.block, matrix(weight.grad.full_tensor(), turned)
        here = local(weight.grad)
        assert type(here) is torch.Tensor
        found[name] = {
            "rows": numbers(block.rows),
            "columns": numbers(block.columns),
            "bias": numbers(block.bias),
            "shape": list(block.shape),
            "cut": block.cut,
            "sharing": [group.size() for group in shard.groups],
            "here": here.mT if turned else here.flatten(1),
            "whole": whole,
        }
        if bias is not None:
            found[name] |= {"b": local(bias.grad), "whole b": bias.grad.full_tensor()}
    return found


# ----------------------------------------------------------------------------------------- cases


def rows(place):
    return told(trained(), FIRST)


def hybrid(place, shape):
    return told(trained(mesh=mesh(place, shape)), FIRST)


def placed(place, shape=None):
    net = trained(SECOND, shard_placement_fn=second, mesh=mesh(place, shape))
    return told(net, SECOND)


def mixed(place):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return told(trained(dtype=torch.float32, mp_policy=policy), FIRST)


def another():
    """A mesh of the same processes with a group of its own."""
    return DeviceMesh.from_group(dist.new_group(), "cpu")


def own(place):
    return told(trained(mesh=another()), FIRST)


def keys(place):
    """Shards of layers that can be handled together are equal."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, 6) for _ in range(5)])
    net[3] = nn.Linear(4, 6, bias=False)
    for layer in net[:2]:
        fully_shard(layer)
    fully_shard(net[2], shard_placement_fn=second)
    fully_shard(net[3])
    fully_shard(net[4], mesh=mesh(place, (1, place.world)))
    shards = [shard_of(layer.weight, layer.bias, False) for layer in net]
    return [[a == b and hash(a) == hash(b) for a in shards] for b in shards]


def sums(place, shape):
    net = trained(mesh=mesh(place, shape))
    flat = torch.tensor([1.0, 10.0**place.rank])
    shard_of(net.wide.weight, net.wide.bias, False).sum(flat)
    return flat


def some(place):
    """Two of the processes share a model, the others have no part in it."""
    pair = DeviceMesh("cpu", [0, 1])
    flat = torch.tensor([1.0, 10.0**place.rank])
    if place.rank < 2:
        net = trained(mesh=pair)
        shard_of(net.wide.weight, net.wide.bias, False).sum(flat)
    return flat


FACTORS = {
    "window": Window(rank=4, vectors=2, rows=None),
    "dense": DenseInverse(),
    "kfac": Covariance(damping=0.1),
    "eva": RankOne(damping=0.3),
}


def preconditioned(place, name, columns):
    """What the blocks become, beside what the whole becomes."""
    how = {"shard_placement_fn": second} if columns else {}
    net = trained(SECOND if columns else FIRST, **how)
    found = {}
    for key in SECOND if columns else FIRST:
        layer, turned = net.get_submodule(key), key in TURNED
        shard = shard_of(layer.weight, layer.bias, turned)
        weight, bias = layer.weight.grad, None if layer.bias is None else layer.bias.grad
        W = matrix(weight.full_tensor(), turned).unsqueeze(0)
        b = None if bias is None else bias.full_tensor().unsqueeze(0)
        d_out, d_in = shard.block.shape
        shape = BatchShape(1, d_out, d_in, b is not None, SIDES, W.dtype, W.device)
        torch.manual_seed(3)
        curvature, ok = FACTORS[name], torch.ones(1, dtype=torch.bool)
        prepared = curvature.prepare(learned(curvature, shape), shape)
        here = local(weight).flatten(1)
        P = (here.mT if turned else here).unsqueeze(0)
        p = None if bias is None else local(bias).unsqueeze(0)
        projected = curvature.project(prepared, P, p, shard.block)
        shard.sum(projected)
        done = curvature.complete(prepared, P, p, projected, ok, shard.block)
        assert done.all()
        assert curvature.apply(prepared, W, b, ok).all()
        found[key] = {
            "found": matrix(weight.full_tensor(), turned),
            "expected": W[0],
            "found b": None if bias is None else bias.full_tensor(),
            "expected b": None if b is None else b[0],
        }
    return found


def written(place, how):
    """AdamW steps on what was written into the blocks."""
    net = trained()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5, weight_decay=0.0, **how)
    before = [p.full_tensor().clone() for p in net.parameters()]
    for parameter in net.parameters():
        local(parameter.grad).fill_(-3.0)
    optimizer.step()
    after = [p.full_tensor() for p in net.parameters()]
    return torch.cat([(q - p).flatten() for p, q in zip(before, after, strict=True)])


def refused(check):
    with pytest.raises(TypeError) as caught:
        check()
    return str(caught.value)


def parallel(place, style, shard=None):
    """Both ways in which a tensor-parallel layer may be met."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    plan = {"0": ColwiseParallel()} if style == "colwise" else {"1": RowwiseParallel()}
    if shard is None:
        parallelize_module(net, init_device_mesh("cpu", (place.world,)), plan)
        return {"model": refused(lambda: check_sharding(net))}
    both = init_device_mesh("cpu", shard, mesh_dim_names=("data", "tensor"))
    parallelize_module(net, both["tensor"], plan)
    fully_shard(net, mesh=both["data"])
    layer = net[0 if style == "colwise" else 1]
    return {
        "model": refused(lambda: check_sharding(net)),
        "layer": refused(lambda: shard_of(layer.weight, layer.bias, False, "the layer")),
    }


def odd(place):
    """Layers that are sharded, but not by ``fully_shard``, or not as a matrix."""
    world = init_device_mesh("cpu", (place.world,))

    def spread(tensor, placement):
        return nn.Parameter(distribute_tensor(tensor, world, [placement]))

    plain, weight = nn.Linear(6, 12), spread(torch.randn(12, 6), Shard(0))
    by_hand = nn.Linear(6, 12)
    by_hand.weight = weight
    conv = nn.Conv2d(2, 3, 6)
    fully_shard(conv, shard_placement_fn=lambda p: Shard(2) if p.dim() == 4 else Shard(0))
    pairs = {
        "copied bias": (weight, spread(torch.randn(12), Replicate())),
        "plain bias": (weight, plain.bias),
        "sharded bias": (plain.weight, spread(torch.randn(12), Shard(0))),
        "rows and bias": (spread(torch.randn(13, 6), Shard(0)), spread(torch.randn(6), Shard(0))),
        "kernel": (conv.weight, conv.bias),
    }
    found = {"by hand": refused(lambda: check_sharding(by_hand))}
    for key, pair in pairs.items():
        found[key] = refused(functools.partial(shard_of, *pair, False, key))
    return found


def accepted(place):
    """Models that are sharded as they should be, or not at all."""
    plain = Net()
    assert shard_of(plain.wide.weight, plain.wide.bias, False) is None
    assert local(plain.wide.weight) is plain.wide.weight
    check_sharding(plain)
    net = trained()
    check_sharding(net)
    check_sharding(nn.Sequential(net, plain))
    copies = distribute_tensor(torch.randn(3, 2), init_device_mesh("cpu", (place.world,)))
    return numbers(shard_of(copies, None, False).block.rows)


def looked_at(place):
    """Which layers are sharded before and after a forward pass alone, and after that."""
    net = trained(names=("narrow",))
    weights = [net.wide.weight, net.narrow.weight]
    found = []

    def look():
        check_sharding(net)
        now = [net.wide.weight, net.narrow.weight]
        found.append([a is b for a, b in zip(now, weights, strict=True)])

    reshard(net)
    look()
    with torch.no_grad():
        net(torch.randn(4, 6, dtype=torch.float64))
    look()
    for _ in range(2):
        reshard(nn.Sequential(net, nn.Linear(2, 2)))
        look()
    new = nn.Linear(3, 4)
    fully_shard(new)
    reshard(new)  # before its first pass
    return found


BLOCKS = {
    "rows": rows,
    "placed": placed,
    "mixed precision": mixed,
    "a group of its own": own,
    "hybrid, two copies": functools.partial(hybrid, shape=(2, 1)),
    "hybrid, one copy of two": functools.partial(hybrid, shape=(1, 2)),
    "hybrid, one copy of two, placed": functools.partial(placed, shape=(1, 2)),
    "hybrid, three copies": functools.partial(hybrid, shape=(3, 1)),
}
ALL = {
    f"{name}, {'columns' if columns else 'rows'}": functools.partial(
        preconditioned, name=name, columns=columns
    )
    for name in FACTORS
    for columns in (False, True)
}
STEPS = {
    f"AdamW, {key}": functools.partial(written, how={key: True} if key != "single" else {})
    for key in ("foreach", "fused", "single")
}
PARALLEL = {
    "colwise": functools.partial(parallel, style="colwise"),
    "rowwise": functools.partial(parallel, style="rowwise"),
    "colwise, sharded": functools.partial(parallel, style="colwise", shard=(1, 2)),
    "rowwise, sharded": functools.partial(parallel, style="rowwise", shard=(1, 2)),
    "colwise, sharded over all": functools.partial(parallel, style="colwise", shard=(2, 1)),
}
SUMS = {
    "sum": functools.partial(sums, shape=None),
    "sum, two copies": functools.partial(sums, shape=(2, 1)),
    "sum, one copy": functools.partial(sums, shape=(1, 2)),
    "sum, two of three": some,
}
REST = {"keys": keys, "odd": odd, "accepted": accepted, "looked at": looked_at}
CASES = BLOCKS | ALL | STEPS | PARALLEL | SUMS | REST
