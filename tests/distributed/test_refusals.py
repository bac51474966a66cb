"""What ``torch.distributed`` offers beside DDP and FSDP2 is refused with a reason."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mkor
from support.launches import launches_of
from support.processes import described


def net_of():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def flattened(world):
    """FSDP1 keeps its parameters in one vector."""
    warnings.simplefilter("ignore")
    return FullyShardedDataParallel(net_of(), device_id=torch.device("cpu"))


def originals(world):
    """FSDP1 that shows the parameters as they were, or what is left of them here."""
    warnings.simplefilter("ignore")
    return FullyShardedDataParallel(net_of(), device_id=torch.device("cpu"), use_orig_params=True)


def tensor_parallel(world, then=lambda net: net):
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return then(
        parallelize_module(net_of(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    )


def both(world):
    """Tensor parallelism first, then FSDP2 over the other dimension of the mesh."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    net = net_of()
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(net, mesh=mesh["dp"])


def by_hand(world):
    net, mesh = net_of(), init_device_mesh("cpu", (world,))
    net[0].weight = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))
    return net


def kernels(world):
    """Cut along a dimension of the kernel."""
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, (2, 1)), nn.Flatten())
    place = lambda p: Shard(2) if p.dim() == 4 else Shard(0)  # noqa: E731
    return fully_shard(net, shard_placement_fn=place)


MODELS = {
    "sharded by hand": (by_hand, "ensor parallel"),
    "a sharded kernel": (kernels, "dimension 2 of its weight"),
    "FSDP1": (flattened, "fully_shard"),
    "FSDP1, original parameters": (originals, "fully_shard"),
    "tensor parallelism": (tensor_parallel, "ensor parallel"),
    "tensor parallelism and FSDP2": (both, "ensor parallel"),
}


def run(place, name):
    """Build and take a step; what is raised is told."""
    net = MODELS[name][0](place.world)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    try:
        optimizer = mkor.MKOR(net, base, skip_output=False)
        net(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    except TypeError as error:
        return described(error, 0.0)
    return None


_launches = launches_of(run)


@pytest.mark.parametrize("world", [2])
@pytest.mark.parametrize("name", MODELS)
def test_refused_with_a_reason(launches, world, name):
    """A ``TypeError`` says what is not supported, on every process."""
    failures = launches(world)[name]
    assert len(failures) == world
    for failure in failures:
        assert failure is not None, "nothing was raised"
        assert MODELS[name][1] in failure["message"].replace("-", " "), failure["message"]
