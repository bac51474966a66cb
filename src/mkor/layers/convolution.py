"""Convolutions: a row is the patch under one output position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mkor import native
from mkor.layers.geometry import Geometry, Lines, crop
from mkor.layers.patches import patch_maps
from mkor.layers.rows import Chunks, parts_of, place, sum_parts
from mkor.layers.sums import PartSums, Pick, accumulator, choose, squares, sums_by
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
        if x.is_nested or x.dim() not in (axes + 1, axes + 2):
            return False
        *samples, channels = x.shape[:-axes]
        if channels * math.prod(self.geometry.kernel) != self.d_in:
            return False
        return output.shape == (*samples, self.d_out, *self.geometry.outputs(x.shape[-axes:]))

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
        plan = self._plan_for(images, first.shape, (len(first), self.d_out, *outputs), pick)
        if plan is not None and native.pays(plan.reads):
            return sums_by(plan, 0, images if dim else first)
        choice, geometry = self._chosen(len(first), outputs, pick), self.geometry
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
        plan = self._plan_for(images, (), sizes, pick)
        if plan is not None and native.pays(plan.reads):
            return sums_by(plan, 1, images if dim else images[0])
        choice = self._chosen(sizes[0], sizes[2:], pick)
        if choice.lines is not None:
            images = [choice.lines.of(g) for g in images]
        first = images[0]
        runs = _runs(images, choice, dim)
        over = (dim + 1, *range(dim + 3, dim + first.dim() + 1))
        dtype = accumulator(first)
        vectors = sum_parts(runs, lambda run: run.sum(over, dtype=dtype), pick.vectors, dim)
        counts = [n * math.prod(first.shape[2:]) for n in choice.counts]
        return PartSums(vectors, squares(runs, dim), counts, total)

    def plan(self, x: Sequence[int], g: Sequence[int], pick: Pick) -> native.Plan | None:
        """How kernels sum a call; see :class:`LayerKind`.

        Args:
            x: Sizes of its input; none where only output gradients are summed.
            g: Sizes of its output, of as many images.
            pick: Which rows are used, in an update that is known.

        Returns:
            The plan; None for convolutions of other than two axes, or whose padding is no zeros.
        """
        if self.geometry.mode != "zeros" or self._axes != 2:
            return None
        samples = g[0] if len(g) > self._axes + 1 else 1
        return _plan(self, tuple(x[-3:]), samples, tuple(g[-2:]), pick)

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

    def _plan_for(
        self, images: Sequence[Tensor], x: Sequence[int], g: Sequence[int], pick: Pick
    ) -> native.Plan | None:
        """The plan for these images, if kernels serve them."""
        if isinstance(pick.update, Tensor) or not native.serves(*images):
            return None
        return self.plan(x, g, pick)

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


@lru_cache(maxsize=64)
def _plan(
    kind: ConvKind, x: tuple[int, ...], samples: int, outputs: tuple[int, int], pick: Pick
) -> native.Plan:
    """Of calls with images ``[samples, *x]``, where ``x`` is empty if nobody asks for inputs."""
    choice = kind._chosen(samples, outputs, pick)
    chosen, across = choice.lines, outputs[1]
    lines = (0, outputs[0]) if chosen is None else (int(chosen.start), chosen.size)
    parts = parts_of(samples, pick.vectors, choice.images, int(choice.pick.update), unit=1)
    geometry = kind.geometry
    before = tuple(padding[0] for padding in geometry.padding)
    inputs = native.Images(
        x or (0, 0, 0),
        geometry.kernel,
        geometry.stride,
        geometry.dilation,
        before,
        lines,
        across,
    )
    one = (1, 1)
    single = native.Images((kind.d_out, *outputs), one, one, one, (0, 0), lines, across)
    widths, total = (kind.d_in, kind.d_out), samples * math.prod(outputs)
    return native.Plan(parts, lines[1] * across, total, widths, (inputs, single))


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
