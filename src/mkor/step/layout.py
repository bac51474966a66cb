"""Groups layers by shape, and lays all their sums out in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mkor.capture.gate import Gate
from mkor.communication.assignment import Assignment
from mkor.communication.sharding import Shard, shard_of
from mkor.curvature.contract import SIDES, BatchShape, Curvature
from mkor.selection import Layer
from mkor.step.batches import Batch
from mkor.step.renewal import inverters
from mkor.step.roster import Roster
from mkor.step.slots import slots_for

__all__ = ["allocate"]

_Key = tuple[BatchShape, Shard | None, int | None]


def allocate(
    layers: Sequence[Layer],
    curvature: Curvature,
    gate: Gate,
    assignment: Assignment | None = None,
) -> tuple[list[Batch], list[Tensor]]:
    """Group layers by shape and lay out their sums.

    Args:
        layers: The preconditioned layers, in the order of the model.
        curvature: Their kind of factor.
        gate: Says how many parts and which sides are captured.
        assignment: Who inverts which layers for others; None where every process does all.

    Returns:
        The batches, and one flat buffer per device and dtype with the sums of all its layers.

    Raises:
        ValueError: Gradients are to be shared whole, but processes store parts of them.
    """
    inverter = inverters(layers, assignment)
    groups: dict[_Key, list[Layer]] = {}
    for layer in layers:
        shard = shard_of(layer.weight, layer.bias, layer.role.transposed, layer.name)
        if shard is not None and assignment is not None and assignment.shares_gradients:
            raise ValueError(
                "grad_worker_fraction below 1 needs processes that hold whole gradients, as under "
                f"DistributedDataParallel, but {layer.name} is sharded: use 1.0"
            )
        groups.setdefault((_shape(layer, gate), shard, inverter(layer)), []).append(layer)
    batches: list[Batch] = []
    buffers: list[Tensor] = []
    for device, dtype in dict.fromkeys((shape.device, shape.dtype) for shape, _, _ in groups):
        plans = []
        end = 0
        for (shape, shard, rank), group in groups.items():
            if (shape.device, shape.dtype) == (device, dtype):
                shape = replace(shape, layers=len(group))
                plans.append((group, shape, slots_for(shape, gate, len(buffers), end), shard, rank))
                end = plans[-1][2].end
        buffers.append(torch.zeros(end, dtype=dtype, device=device))
        update = torch.zeros((), dtype=torch.int64, device=device)
        roster = Roster([shape for _, shape, *_ in plans])
        batches += [
            Batch(
                group,
                shape,
                curvature,
                slots,
                buffers[-1],
                roster,
                span,
                update,
                shard,
                rank,
                assignment is None or assignment.preconditions(rank or 0),
            )
            for (group, shape, slots, shard, rank), span in zip(plans, roster.spans, strict=True)
        ]
    return batches, buffers


def _shape(layer: Layer, gate: Gate) -> BatchShape:
    weight = layer.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sides = tuple(side for side in SIDES if getattr(gate, side))
    kind = layer.kind
    return BatchShape(0, kind.d_out, kind.d_in, layer.bias is not None, sides, dtype, weight.device)
