"""Convolutions: a row is the patch under one output position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mkor import native
from mkor.layers.geometry import Geometry, Lines, crop
from mkor.layers.patches import patch_maps
from mkor.layers.rows import Chunks, parts_of, place, sum_parts
from mkor.layers.sums import PartSums, Pick, accumulator, choose, squares
from mkor.memo import memo

__all__ = ["ConvKind"]

SLAB = 1 << 22
"""Most entries of patches at a time, where all of them are needed."""

OVERLAP = 4
"""Neighbouring patches that count as one row, because they are nearly the same."""

GOLDEN = 0.618
"""Share of an image's height from the lines of one update to those of the next."""

SMALL = 1 << 18
"""Calls whose output's used positions, or a line of them, have no more entries are stacked."""


class _Choice(NamedTuple):
    """What of a call is used.

    Attributes:
        lines: Of the output; None for all.
        images: None for all, in nearly equal parts.
        counts: Images in each part.
        pick: Moves the images.
    """

    lines: Lines | None
    images: Chunks | None
    counts: list[int]
    pick: Pick


@dataclass(frozen=True)
class ConvKind:
    """``nn.Conv1d/2d/3d`` without groups: a row is the patch under one output position.

    A sum of patches is the patch sum of a summed image, and summing one axis' windows is a product
    with a small 0/1 matrix, so no batch is ever unfolded for means; full covariances need patches.
    """

    d_in: int
    d_out: int
    geometry: Geometry

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether images became what the geometry makes of them; see :class:`LayerKind`.

        Args:
            x: Input of a call.
            output: Output of the call.

        Returns:
            False for anything else.
        """
        axes = self._axes
        if x.is_nested or x.dim() not in (axes + 1, axes + 2) or x.dim() != output.dim():
            return False
        sizes = self.geometry.outputs(x.shape[-axes:])
        return output.shape[-axes - 1 :] == (self.d_out, *sizes)

    def input_sums(self, x: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of ``a``; see :class:`LayerKind`.

        Args:
            x: ``[n, channels, *spatial]``, or one image without the first dimension; or those of
                several layers.
            pick: Which rows are used; a chunk is a few lines of one image, at least one and the
                same in all chunks, or whole images where these are small.

        Returns:
            Vectors ``[k, channels * kernel positions]``, ordered like the flattened weight; of
            several layers ``[B, k, ...]``.
        """
        xs, dim = _listed(x)
        images = [self._batched(x) for x in xs]
        first = images[0]
        outputs = self.geometry.outputs(first.shape[2:])
        choice, geometry = self._chosen(len(first), outputs, pick), self.geometry
        if self._served(images, pick):
            axes = [
                (axis.kernel, axis.stride, axis.dilation, axis.padding[0], axis.outputs)
                for axis in geometry.axes(first.shape[2:])
            ]
            lines = _lines(choice, outputs[0])
            parts = _parts(choice, len(first))
            found = native.patch_sums(images, axes, lines, parts)
            return _part_sums(found, choice, (len(first), *outputs), x)
        if choice.lines is not None:
            cropped = [crop(x, geometry, choice.lines) for x in images]
            images, geometry = [x for x, _ in cropped], cropped[0][1]
        maps = patch_maps(images[0].shape[2:], geometry, accumulator(first), first.device)
        runs = _runs(images, choice, dim)
        sums = sum_parts(runs, lambda run: _image_sums(run, dim), pick.vectors, dim)
        counts = [n * maps.positions for n in choice.counts]
        return PartSums(
            maps.sums(sums), maps.squares(runs, dim), counts, len(first) * math.prod(outputs)
        )

    def output_sums(self, g: Tensor | Sequence[Tensor], pick: Pick) -> PartSums:
        """Sums of raw ``g`` over the same positions; see :class:`LayerKind`.

        Args:
            g: ``[n, d_out, *output positions]``, or one image without the first dimension; or those
                of several layers.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_out]``; of several layers ``[B, k, d_out]``.
        """
        gs, dim = _listed(g)
        images = [self._batched(g) for g in gs]
        total = images[0].numel() // self.d_out
        sizes = images[0].shape
        choice = self._chosen(sizes[0], sizes[2:], pick)
        if self._served(images, pick):
            lines = _lines(choice, sizes[2])
            found = native.line_sums(images, lines, _parts(choice, sizes[0]))
            return _part_sums(found, choice, (sizes[0], *sizes[2:]), g)
        if choice.lines is not None:
            images = [choice.lines.of(g) for g in images]
        first = images[0]
        runs = _runs(images, choice, dim)
        over = (dim + 1, *range(dim + 3, dim + first.dim() + 1))
        dtype = accumulator(first)
        vectors = sum_parts(runs, lambda run: run.sum(over, dtype=dtype), pick.vectors, dim)
        counts = [n * math.prod(first.shape[2:]) for n in choice.counts]
        return PartSums(vectors, squares(runs, dim), counts, total)

    def stacks(self, x: Tensor, pick: Pick) -> bool:
        """Whether calls like this are summed together; see :class:`LayerKind`.

        Args:
            x: Its input, or the gradient of its output.
            pick: Which rows are used.

        Returns:
            Whether these are few.
        """
        if pick.rows is None or self.geometry.mode != "zeros":
            return False
        positions = max(OVERLAP * pick.rows, math.prod(x.shape[1 - self._axes :]))
        return pick.vectors * positions * x.shape[-self._axes - 1] <= SMALL

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """All patches, a few images at a time; see :class:`LayerKind`.

        Args:
            x: ``[n, channels, *spatial]``, or one image without the first dimension.

        Yields:
            ``[patches, channels * kernel positions]``, ordered like the flattened weight.
        """
        x = self._batched(x)
        images = max(1, SLAB // max(1, math.prod(self.geometry.outputs(x.shape[2:])) * self.d_in))
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

    def _served(self, images: Sequence[Tensor], pick: Pick) -> bool:
        """Whether there are kernels for these images."""
        plain = self.geometry.mode == "zeros" and self._axes == 2
        if not plain or isinstance(pick.update, Tensor) or not native.serves(*images):
            return False
        return pick.rows is not None or native.pays(images[0].numel())

    @property
    def _axes(self) -> int:
        return len(self.geometry.kernel)

    def _patches(self, x: Tensor) -> Tensor:
        padding, mode, n = self.geometry.padding, self.geometry.mode, self._axes
        if any(map(any, padding)):
            flat = [p for both in reversed(padding) for p in both]
            x = F.pad(x, flat, "constant" if mode == "zeros" else mode)
        for at, axis in enumerate(self.geometry.axes(x.shape[2:]), start=2):
            x = x.unfold(at, axis.reach, axis.stride)[..., :: axis.dilation]
        order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        return x.permute(order).reshape(-1, self.d_in)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == self._axes + 1 else x

    def _chosen(self, samples: int, outputs: Sequence[int], pick: Pick) -> _Choice:
        positions, line = math.prod(outputs), math.prod(outputs[1:])
        size = None if pick.rows is None else max(1, round(pick.rows / max(1, positions)))
        images, counts = place(samples, pick.vectors, size)
        if pick.rows is None or self.geometry.mode != "zeros":
            return _Choice(None, images, counts, pick)
        lines = max(1, round(OVERLAP * pick.rows / max(1, line)))
        if lines >= outputs[0]:
            return _Choice(None, images, counts, pick)
        chunks = Chunks(1, lines, outputs[0], outputs[0] - lines)
        start = chunks.offset(pick.update * _step(chunks.turn))
        if images is not None:
            # Else, where both turns share a factor, the same images would meet the same lines.
            late = pick.update // math.lcm(chunks.turn, images.turn)
            pick = pick._replace(update=pick.update + late)
        return _Choice(Lines(start, lines), images, counts, pick)


@memo(maxsize=64)
def _step(turn: int) -> int:
    """A step through a turn that visits all of it, and soon the most distant parts."""
    step = max(1, round(GOLDEN * turn))
    while math.gcd(step, turn) > 1:
        step += 1
    return step


def _lines(choice: _Choice, all_of_them: int) -> tuple[int, int]:
    """The first line that is used, and how many are."""
    lines = choice.lines
    return (0, all_of_them) if lines is None else (int(lines.start), lines.size)


def _parts(choice: _Choice, images: int) -> native.Parts:
    """Parts of the images."""
    pick = choice.pick
    return parts_of(images, pick.vectors, choice.images, int(pick.update), unit=1)


def _part_sums(
    found: tuple[Tensor, Tensor],
    choice: _Choice,
    sizes: Sequence[int],
    x: Tensor | Sequence[Tensor],
) -> PartSums:
    """What a kernel found in images whose output has these sizes, of one call or of several."""
    _, lines = _lines(choice, sizes[1])
    counts = [n * lines * math.prod(sizes[2:]) for n in choice.counts]
    sums = PartSums(*found, counts, math.prod(sizes))
    return sums.of(0) if isinstance(x, Tensor) else sums


def _listed(x: Tensor | Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """Calls, and how many dimensions of their results count them."""
    return ([x], 0) if isinstance(x, Tensor) else (x, 1)


def _runs(images: Sequence[Tensor], choice: _Choice, dim: int) -> list[Tensor]:
    """The chosen images; those of several layers stacked."""
    each = [choose(x, choice.pick, choice.images) for x in images]
    return [torch.stack(run) for run in zip(*each, strict=True)] if dim else each[0]


def _image_sums(run: Tensor, dim: int) -> Tensor:
    """``[..., parts, channels, *spatial]``: images summed over each part."""
    if run.shape[dim + 1] == 1:
        return run.select(dim + 1, 0).to(accumulator(run))
    return run.sum(dim + 1, dtype=accumulator(run))
