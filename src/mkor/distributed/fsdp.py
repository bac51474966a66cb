"""FSDP2: which block of a layer this process stores, and sums over those who store the others.

``fully_shard`` keeps every parameter, and so its gradient, as a DTensor that is cut along one of
its dimensions into as many parts as processes share it; the last ones may be smaller, or empty.
In a hybrid mesh the first dimension holds copies, which need no sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from mkor._torch import is_tensor_parallel
from mkor.layers.layer import Block

INSTEAD = "train with fully_shard (FSDP2) alone, or with DistributedDataParallel"


@dataclass(frozen=True)
class Shard:
    """Which part of a layer is stored here.

    Attributes:
        block: The part.
        groups: The processes that store the parts of one copy, unless this is the only one.
    """

    block: Block
    groups: tuple[dist.ProcessGroup, ...]


def sum_over_shards(parts: Sequence[tuple[Shard, Tensor]]) -> list[Tensor]:
    """Each tensor summed over the processes that store the other parts of its layers.

    One collective for each group of processes, device and dtype; the parts must come in the same
    order on all of them.
    """
    sums = [tensor for _, tensor in parts]
    together: dict[object, list[int]] = {}
    for place, (shard, tensor) in enumerate(parts):
        together.setdefault((shard.groups, tensor.device, tensor.dtype), []).append(place)
    for places in together.values():
        flat = torch.cat([sums[place].flatten() for place in places])
        for group in parts[places[0]][0].groups:
            dist.all_reduce(flat, group=group)
        pieces = flat.split([sums[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            sums[place] = piece.view(sums[place].shape)
    return sums


def reshard(model: nn.Module) -> None:
    """Put the shards back into the modules, where a forward pass alone left whole weights.

    ``fully_shard`` leaves its outermost group so until the next backward pass; layers then seem to
    hold other parameters than the base optimizer. Must not be called between the two passes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_sharding(model: nn.Module) -> None:
    """Refuse models whose parameters are spread over processes by something else than FSDP2."""
    sharded: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            sharded.update(id(parameter) for parameter in module.parameters())
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            parallel = is_tensor_parallel(module)
            if isinstance(parameter, DTensor) and (parallel or id(parameter) not in sharded):
                _refuse(f"{name}.{key}" if name else key, "is tensor-parallel")


def shard_of(
    weight: Tensor, bias: Tensor | None, transposed: bool, name: str = "a layer"
) -> Shard | None:
    """Where a layer's block is in the whole."""
    if not isinstance(weight, DTensor):
        if isinstance(bias, DTensor):
            _refuse(name, "has a bias that is sharded, but a weight that is not")
        return None
    dim, here = _part(weight, name)
    if dim > 1:
        raise TypeError(
            f"{name} is cut along dimension {dim} of its weight, which is no block of a matrix: "
            "let shard_placement_fn choose Shard(0) or Shard(1)"
        )
    # A convolution's columns are its input channels, each with all places of the kernel.
    places = math.prod(weight.shape[2:])
    first, second = weight.shape[0], weight.shape[1] * places
    if dim == 1:
        here = slice(here.start * places, here.stop * places)
    d_out, d_in = (second, first) if transposed else (first, second)
    cut = "rows" if (dim == 0) is not transposed else "columns"
    rows, columns = (here, slice(0, d_in)) if cut == "rows" else (slice(0, d_out), here)
    entries = slice(0, 0) if bias is None else _bias_part(weight, bias, name)
    if bias is not None and cut == "rows" and entries != rows:
        _refuse(name, "has a bias that is cut at other places than its weight")
    return Shard(Block(rows, columns, entries, cut), _groups(weight))


def _part(tensor: DTensor, name: str) -> tuple[int, slice]:
    """The dimension that is cut, and which part of it is here."""
    *copies, last = tensor.placements
    if not all(isinstance(p, Replicate) for p in copies) or type(last) not in (Cut, Replicate):
        _refuse(name, f"is tensor-parallel, or cut more than once: {list(tensor.placements)}")
    dim = last.dim if isinstance(last, Cut) else 0
    size, mesh = tensor.shape[dim], tensor.device_mesh
    parts, place = 1, 0
    if isinstance(last, Cut):
        parts, place = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    most = -(-size // parts)
    here = slice(min(place * most, size), min((place + 1) * most, size))
    if tensor.to_local().shape[dim] != here.stop - here.start:
        _refuse(name, f"stores {tuple(tensor.to_local().shape)} of {tuple(tensor.shape)} here")
    return dim, here


def _bias_part(weight: DTensor, bias: Tensor, name: str) -> slice:
    if not isinstance(bias, DTensor) or bias.device_mesh != weight.device_mesh:
        _refuse(name, "has a weight that is sharded, but a bias that is not, or otherwise")
    if [type(p) for p in bias.placements] != [type(p) for p in weight.placements]:
        _refuse(name, "has a bias that is sharded otherwise than its weight")
    return _part(bias, name)[1]


def _groups(weight: DTensor) -> tuple[dist.ProcessGroup, ...]:
    mesh, last = weight.device_mesh, weight.device_mesh.ndim - 1
    alone = isinstance(weight.placements[last], Replicate) or mesh.size(last) == 1
    return () if alone else (mesh.get_group(last),)


def _refuse(name: str, what: str) -> NoReturn:
    raise TypeError(f"{name} {what}: {INSTEAD}")
