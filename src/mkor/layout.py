"""Groups layers by shape, and lays all their sums out in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor.batches import Batch
from mkor.capture import META, Gate
from mkor.curvature.contract import SIDES, BatchShape, Curvature
from mkor.selection import Layer

__all__ = ["allocate"]


def allocate(
    layers: Sequence[Layer], curvature: Curvature, gate: Gate
) -> tuple[list[Batch], list[Tensor]]:
    """Group layers by shape and lay out their sums.

    Args:
        layers: The preconditioned layers, in the order of the model.
        curvature: Their kind of factor.
        gate: Says how many parts and which sides are captured.

    Returns:
        The batches, and one flat buffer per device and dtype with the sums of all its layers.
    """
    groups: dict[BatchShape, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_shape(layer, gate), []).append(layer)
    batches, buffers = [], []
    for place in dict.fromkeys((shape.device, shape.dtype) for shape in groups):
        here = {s: group for s, group in groups.items() if (s.device, s.dtype) == place}
        widths = {s: _widths(s, gate) for s in here}
        size = sum(len(group) * sum(widths[s]) for s, group in here.items())
        buffer = torch.zeros(size, dtype=place[1], device=place[0])
        buffers.append(buffer)
        update = torch.zeros((), dtype=torch.int64, device=place[0])
        start = 0
        for s, group in here.items():
            sums = []
            for width in widths[s]:
                sums.append(buffer[start : start + len(group) * width].view(len(group), width))
                start += len(group) * width
            a, g, meta = sums
            views = (_split(a, s.d_in, gate), _split(g, s.d_out, gate), meta)
            shape = BatchShape(len(group), s.d_out, s.d_in, s.bias, s.sides, s.dtype, s.device)
            batches.append(Batch(group, shape, curvature, views, update))
    return batches, buffers


def _shape(layer: Layer, gate: Gate) -> BatchShape:
    weight = layer.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sides = tuple(side for side in SIDES if getattr(gate, side))
    kind = layer.kind
    return BatchShape(0, kind.d_out, kind.d_in, layer.bias is not None, sides, dtype, weight.device)


def _widths(shape: BatchShape, gate: Gate) -> tuple[int, int, int]:
    right, left = (_rows(d, gate) * d for d in (shape.d_in, shape.d_out))
    return right * gate.right, left * gate.left, META + gate.vectors


def _rows(width: int, gate: Gate) -> int:
    return gate.vectors + width * gate.covariance


def _split(sums: Tensor, width: int, gate: Gate) -> Tensor:
    return sums.view(len(sums), _rows(width, gate), -1) if sums.numel() else sums.unsqueeze(1)
