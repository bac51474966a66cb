"""Convolutions: a row is the patch under one output position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from mkor.patches import PatchMaps, patch_maps
from mkor.rows import place, sum_parts
from mkor.sums import PartSums, Pick, accumulator, choose, squares

__all__ = ["ConvKind"]

SLAB = 1 << 22
"""Most entries of patches at a time, where all of them are needed."""


@dataclass(frozen=True)
class ConvKind:
    """``nn.Conv1d/2d/3d`` without groups: a row is the patch under one output position.

    A sum of patches is the patch sum of a summed image, and summing one axis' windows is a product
    with a small 0/1 matrix, so no batch is ever unfolded for means; full covariances need patches.
    """

    d_in: int
    d_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether images became images with ``d_out`` channels; see :class:`LayerKind`.

        Args:
            x: Input of a call.
            output: Output of the call.

        Returns:
            False for anything else.
        """
        axes = len(self.kernel)
        if x.is_nested or x.dim() not in (axes + 1, axes + 2) or x.dim() != output.dim():
            return False
        return output.shape[-axes - 1] == self.d_out

    def input_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of ``a`` over the patches of the chosen images; see :class:`LayerKind`.

        Args:
            x: ``[n, channels, *spatial]``, or one image without the first dimension.
            pick: Which rows are used; a chunk is whole images.

        Returns:
            Vectors ``[k, channels * kernel positions]``, ordered like the flattened weight.
        """
        x = self._batched(x)
        maps = self._maps(x)
        runs, counts = _images(x, pick, maps.positions)
        images = sum_parts(runs, _image_sums, pick.vectors)
        return PartSums(maps.sums(images), maps.squares(runs), counts, len(x) * maps.positions)

    def output_sums(self, g: Tensor, pick: Pick) -> PartSums:
        """Sums of raw ``g`` over the positions of the chosen images; see :class:`LayerKind`.

        Args:
            g: ``[n, d_out, *output positions]``, or one image without the first dimension.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_out]``.
        """
        g = self._batched(g)
        positions = math.prod(g.shape[2:])
        runs, counts = _images(g, pick, positions)
        dims = (1, *range(3, g.dim() + 1))
        vectors = sum_parts(runs, lambda run: run.sum(dims, dtype=accumulator(g)), pick.vectors)
        return PartSums(vectors, squares(runs), counts, len(g) * positions)

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """All patches, a few images at a time; see :class:`LayerKind`.

        Args:
            x: ``[n, channels, *spatial]``, or one image without the first dimension.

        Yields:
            ``[patches, channels * kernel positions]``, ordered like the flattened weight.
        """
        x = self._batched(x)
        images = max(1, SLAB // max(1, self._maps(x).positions * self.d_in))
        for slab in x.split(images):
            yield self._patches(slab)

    def output_rows(self, g: Tensor) -> Iterator[Tensor]:
        """All positions; see :class:`LayerKind`.

        Args:
            g: ``[n, d_out, *output positions]``, or one image without the first dimension.

        Yields:
            ``[positions, d_out]``.
        """
        yield self._batched(g).movedim(1, -1).reshape(-1, self.d_out)

    def _patches(self, x: Tensor) -> Tensor:
        axes = len(self.kernel)
        if any(map(any, self.padding)):
            flat = [p for both in reversed(self.padding) for p in both]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, flat, mode)
        for axis in range(axes):
            dilation = self.dilation[axis]
            x = x.unfold(2 + axis, dilation * (self.kernel[axis] - 1) + 1, self.stride[axis])
            x = x[..., ::dilation]
        order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        return x.permute(order).reshape(-1, self.d_in)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == len(self.kernel) + 1 else x

    def _maps(self, x: Tensor) -> PatchMaps:
        shape = (self.kernel, self.stride, self.dilation, self.padding, self.padding_mode)
        return patch_maps(x.shape[2:], *shape, accumulator(x), x.device)


def _images(x: Tensor, pick: Pick, positions: int) -> tuple[list[Tensor], list[int]]:
    """The chosen images, and the rows in each part."""
    size = None if pick.rows is None else max(1, round(pick.rows / max(1, positions)))
    chunks, sizes = place(len(x), pick.vectors, size)
    return choose(x, pick, chunks), [n * positions for n in sizes]


def _image_sums(run: Tensor) -> Tensor:
    """``[parts, channels, *spatial]``: images summed over each part."""
    return (
        run[:, 0].to(accumulator(run)) if run.shape[1] == 1 else run.sum(1, dtype=accumulator(run))
    )
