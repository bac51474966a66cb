"""Sums over the patches of images, without unfolding any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mkor.sums import accumulator

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
            images: ``[k, channels, *spatial]``.

        Returns:
            ``[k, channels * taps]``, ordered like a flattened weight.
        """
        if torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self.sums(images)
        if self.flat is not None:
            return F.linear(images.flatten(2), self.flat).flatten(1)
        for axis, axis_map in enumerate(self.axes[:-1], start=2):
            images = (axis_map @ images.movedim(axis, -2)).movedim(-2, axis)
        return F.linear(images, self.axes[-1]).flatten(1)

    def squares(self, runs: list[Tensor]) -> Tensor:
        """Sum of the squares of all patches' entries.

        Args:
            runs: ``[parts, samples, channels, *spatial]`` each.

        Returns:
            0-dim.
        """
        found = []
        for run in runs:
            for some in run.split(max(1, SLAB // max(1, run[0].numel()))):
                weighted = (some.to(accumulator(run)) * self.root).flatten()
                # A norm over the first dimensions is forty times slower.
                found.append(torch.dot(weighted, weighted))
        return found[0] if len(found) == 1 else torch.stack(found).sum()


def patch_maps(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> PatchMaps:
    """The maps of a convolution; made once for each size of images.

    Args:
        sizes: Of an image.
        kernel: Of the convolution, for each axis like all that follows.
        stride: Of the convolution.
        dilation: Of the convolution.
        padding: Before and after.
        mode: ``padding_mode``.
        dtype: Of the maps.
        device: Of the maps.

    Returns:
        The maps.
    """
    # The compiler folds them into the graph and warns of caches.
    build = _build.__wrapped__ if torch.compiler.is_compiling() else _build
    return build(tuple(sizes), kernel, stride, dilation, padding, mode, dtype, device)


@lru_cache(maxsize=256)
def _build(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> PatchMaps:
    each = list(zip(sizes, kernel, stride, dilation, padding, strict=True))
    positions = math.prod([_outputs(*axis) for axis in each])
    axes = tuple(_axis_map(*axis, mode, dtype, device) for axis in each)
    cover = flat = axes[0].new_ones(1, 1)
    for axis in axes:
        cover = cover.flatten().unsqueeze(1) * axis.sum(0)
    if math.prod(sizes) > FLAT:
        return PatchMaps(positions, axes, None, cover.view(sizes).sqrt())
    for axis in axes:
        flat = (flat[:, None, :, None] * axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return PatchMaps(positions, axes, flat, cover.view(sizes).sqrt())


def _outputs(size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]) -> int:
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


def _axis_map(
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``[kernel, size]``: how often each position of an axis lies under each kernel tap."""
    where = torch.arange(size, dtype=torch.float32, device=device).view(1, 1, size)
    mode = "constant" if mode == "zeros" else mode
    padded = F.pad(where, padding, mode, size if mode == "constant" else None)
    taps = padded.view(-1).unfold(0, dilation * (kernel - 1) + 1, stride)[:, ::dilation]
    counts = torch.zeros(size + 1, kernel, dtype=dtype, device=device)
    counts.scatter_add_(0, taps.long(), torch.ones_like(taps, dtype=dtype))
    return counts[:size].mT.contiguous()
