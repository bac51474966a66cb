"""Sums over the patches of images, without unfolding any."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mkor.layers.geometry import Axis, Geometry
from mkor.layers.sums import accumulator
from mkor.memo import memo

__all__ = ["PatchMaps", "patch_maps"]

SLAB = 1 << 22
"""Most entries that are squared at a time."""

FLAT = 1 << 8
"""Images of no more positions are summed by one product, larger ones axis by axis."""


@dataclass(frozen=True)
class PatchMaps:
    """Which positions of an image lie under which taps of a kernel, in all its patches.

    Attributes:
        positions: Of the kernel in an image, the rows of a sample.
        axes: For each axis ``[kernel, size]``: how often a position lies under a tap.
        flat: ``[all taps, all positions]``, their product; None for large images.
        root: ``[*spatial]``, the root of how many taps a position lies under.
    """

    positions: int
    axes: tuple[Tensor, ...]
    flat: Tensor | None
    root: Tensor

    def sums(self, images: Tensor) -> Tensor:
        """Sums of patches.

        Args:
            images: ``[..., channels, *spatial]``.

        Returns:
            ``[..., channels * taps]``, ordered like a flattened weight.
        """
        if torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self.sums(images)
        n = len(self.axes)
        if self.flat is not None:
            return F.linear(images.flatten(-n), self.flat).flatten(-2)
        for axis, axis_map in zip(range(-n, -1), self.axes[:-1], strict=True):
            images = (axis_map @ images.movedim(axis, -2)).movedim(-2, axis)
        return F.linear(images, self.axes[-1]).flatten(-n - 1)

    def squares(self, runs: list[Tensor], dim: int = 0) -> Tensor:
        """Sum of the squares of all patches' entries.

        Args:
            runs: ``[..., parts, samples, channels, *spatial]`` each.
            dim: Where the parts lie; what comes before stays.

        Returns:
            ``[...]``.
        """
        found = []
        for run in runs:
            parts = max(1, SLAB // max(1, run.select(dim, 0).numel()))
            for some in run.split(parts, dim):
                # A norm over the first dimensions is forty times slower.
                weighted = (some.to(accumulator(run)) * self.root).flatten(dim)
                found.append(torch.linalg.vector_norm(weighted, dim=-1).square())
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)


@memo(maxsize=256)
def patch_maps(
    sizes: torch.Size, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> PatchMaps:
    """The maps of a convolution; made once for each size of images.

    Args:
        sizes: Of an image.
        geometry: Of the convolution.
        dtype: Of the maps.
        device: Of the maps.

    Returns:
        The maps.
    """
    positions = math.prod(geometry.outputs(sizes))
    axes = tuple(_axis_map(axis, geometry.mode, dtype, device) for axis in geometry.axes(sizes))
    cover = flat = axes[0].new_ones(1, 1)
    for axis in axes:
        cover = cover.flatten().unsqueeze(1) * axis.sum(0)
    if math.prod(sizes) > FLAT:
        return PatchMaps(positions, axes, None, cover.view(sizes).sqrt())
    for axis in axes:
        flat = (flat[:, None, :, None] * axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return PatchMaps(positions, axes, flat, cover.view(sizes).sqrt())


def _axis_map(axis: Axis, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[kernel, size]``: how often each position of an axis lies under each kernel tap."""
    size, (before, after) = axis.size, axis.padding
    if mode == "zeros":
        # Paddings may be negative, which leaves positions out.
        padded = torch.arange(-before, size + after, device=device)
        padded = padded.where((padded >= 0) & (padded < size), size)
    else:
        where = torch.arange(size, dtype=torch.float32, device=device).view(1, 1, size)
        padded = F.pad(where, axis.padding, mode).view(-1).long()
    taps = padded.unfold(0, axis.reach, axis.stride)[:, :: axis.dilation]
    counts = torch.zeros(size + 1, axis.kernel, dtype=dtype, device=device)
    counts.scatter_add_(0, taps, torch.ones_like(taps, dtype=dtype))
    return counts[:size].mT.contiguous()
