"""Convolutions: a row is the patch under one output position.

A sum of patches is the patch sum of a summed image, and summing one axis' windows is a product with
a small 0/1 matrix, so no batch is ever unfolded for means; full covariances need the patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mkor._torch import is_tracing
from mkor.layers.rows import (
    Chunks,
    RowSelection,
    Sums,
    accumulator,
    moments,
    norm_of,
    place,
    split_evenly,
    sum_parts,
)

SLAB = 1 << 22
"""Most entries of patches, or of squares of images, at a time."""

OVERLAP = 4
"""Neighbouring patches that count as one row, because they are nearly the same."""

GOLDEN = 0.618
"""Share of an image's height from the lines of one update to those of the next."""


class Axis(NamedTuple):
    """One axis of images and how a kernel moves along it."""

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]

    @property
    def reach(self) -> int:
        """Positions from the kernel's first tap to its last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def outputs(self) -> int:
        """Positions of the output."""
        return (self.size + sum(self.padding) - self.reach) // self.stride + 1


class Geometry(NamedTuple):
    """How a convolution moves over images; a number for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str

    def axes(self, sizes: Sequence[int]) -> list[Axis]:
        """The axes over images of these sizes."""
        rest = zip(sizes, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return [Axis(*axis) for axis in rest]

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output over images of these sizes."""
        return tuple(axis.outputs for axis in self.axes(sizes))


class OutputLines(NamedTuple):
    """Neighbouring positions of a convolution's output along its first axis: a strip of it."""

    start: Tensor
    size: int


class _Choice(NamedTuple):
    """What of a call is used.

    Attributes:
        images: Which, ``[n]``; None for all.
        counts: Images in each part.
        lines: Of the output; None for all.
        key: Of the indices, for calls that share them.
    """

    images: Tensor | None
    counts: list[int]
    lines: OutputLines | None


@dataclass(frozen=True)
class ConvKind:
    """``nn.Conv1d/2d/3d`` without groups.

    A chunk is whole images, as many as bring about ``m`` rows. Of images with more positions, a few
    lines are used, at least one and the same in all chunks, moving from update to update.
    """

    d_in: int
    d_out: int
    geometry: Geometry

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether images became what the geometry makes of them; a subclass may do otherwise."""
        axes = self._axes
        if x.is_nested or x.dim() not in (axes + 1, axes + 2):
            return False
        *samples, channels = x.shape[:-axes]
        if channels * math.prod(self.geometry.kernel) != self.d_in:
            return False
        return output.shape == (*samples, self.d_out, *self.geometry.outputs(x.shape[-axes:]))

    def input_sums(self, x: Tensor, selection: RowSelection) -> Sums:
        """Sums of patches of ``x [n, channels, *spatial]``, ordered like the flattened weight."""
        x = self._batched(x)
        outputs, geometry = self.geometry.outputs(x.shape[2:]), self.geometry
        total = len(x) * math.prod(outputs)
        choice = self._chosen(len(x), outputs, selection)
        if choice.lines is not None:
            x, geometry = self._under(x, choice, choice.lines, selection)
        elif choice.images is not None:
            x = x.index_select(0, choice.images)
        maps = patch_maps(x.shape[2:], geometry, accumulator(x), x.device)
        runs = split_evenly(x, selection.vectors)
        sums = sum_parts(runs, lambda run: run.sum(1, dtype=accumulator(x)), selection.vectors)
        counts = [n * maps.positions for n in choice.counts]
        return Sums(maps.sums(sums), maps.norm(x), counts, total)

    def output_sums(self, g: Tensor, selection: RowSelection) -> Sums:
        """Sums of raw ``g`` over the same positions of ``g [n, d_out, *spatial]``."""
        g = self._batched(g)
        total = g.numel() // self.d_out
        choice = self._chosen(len(g), g.shape[2:], selection)
        if choice.lines is not None:
            lines = choice.lines
            places = selection.once(
                (g.shape[2:], lines.size),
                lambda: lines.start + torch.arange(lines.size, device=g.device),
            )
            g = _lines(g, choice.images, places)
        elif choice.images is not None:
            g = g.index_select(0, choice.images)
        runs = split_evenly(g, selection.vectors)
        over = (1, *range(3, g.dim() + 1))
        vectors = sum_parts(
            runs, lambda run: run.sum(over, dtype=accumulator(g)), selection.vectors
        )
        positions = math.prod(g.shape[2:])
        return Sums(vectors, norm_of([g]), [n * positions for n in choice.counts], total)

    def input_moments(self, x: Tensor) -> Sums:
        """Moments of all patches, a few images at a time."""
        return moments(self._slabs(self._batched(x)))

    def output_moments(self, g: Tensor) -> Sums:
        """Moments of all positions of ``g``."""
        return moments([self._batched(g).movedim(1, -1).reshape(-1, self.d_out)])

    @property
    def _axes(self) -> int:
        return len(self.geometry.kernel)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == self._axes + 1 else x

    def _slabs(self, x: Tensor) -> Iterator[Tensor]:
        """All patches ``[patches, d_in]`` of ``x [n, channels, *spatial]``."""
        positions = math.prod(self.geometry.outputs(x.shape[2:]))
        for slab in x.split(max(1, SLAB // max(1, positions * self.d_in))):
            yield self._patches(slab)

    def _patches(self, x: Tensor) -> Tensor:
        padding, mode, n = self.geometry.padding, self.geometry.mode, self._axes
        if any(map(any, padding)):
            flat = [p for both in reversed(padding) for p in both]
            x = F.pad(x, flat, "constant" if mode == "zeros" else mode)
        for at, axis in enumerate(self.geometry.axes(x.shape[2:]), start=2):
            x = x.unfold(at, axis.reach, axis.stride)[..., :: axis.dilation]
        order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        return x.permute(order).reshape(-1, self.d_in)

    def _chosen(self, samples: int, outputs: Sequence[int], selection: RowSelection) -> _Choice:
        """Which images, and which lines of the output, a call with such sizes uses."""
        k, m, update = selection.vectors, selection.rows, selection.update
        positions, line = math.prod(outputs), math.prod(outputs[1:])
        size = None if m is None else max(1, round(m / max(1, positions)))
        images, counts = place(samples, k, size)
        lines = None
        if m is not None and self.geometry.mode == "zeros":
            wanted = max(1, round(OVERLAP * m / max(1, line)))
            if wanted < outputs[0]:
                lines = Chunks(1, wanted, outputs[0], outputs[0] - wanted)
        key = (images, lines, samples, k)
        strip = None
        if lines is not None:
            moved = selection.once(
                ("lines", *key), lambda: lines.offset(update * _step(lines.turn))
            )
            strip = OutputLines(moved, lines.size)
        if images is None:
            return _Choice(None, counts, strip)
        # Else, where both turns share a factor, the same images would meet the same lines.
        period = 0 if lines is None else math.lcm(lines.turn, images.turn)
        chosen = selection.once(
            ("images", *key),
            lambda: images.indices(update + update // period if period else update),
        )
        return _Choice(chosen, counts, strip)

    def _under(
        self, x: Tensor, choice: _Choice, lines: OutputLines, selection: RowSelection
    ) -> tuple[Tensor, Geometry]:
        """The part of images under the patches of some lines, and what makes these lines of it."""
        stride, (before, after), size = (
            self.geometry.stride[0],
            self.geometry.padding[0],
            x.shape[2],
        )
        reach = (lines.size - 1) * stride + self.geometry.axes(x.shape[2:])[0].reach
        key = ("under", x.shape[2:], self.geometry, lines.size)
        places = selection.once(
            key, lambda: lines.start * stride - before + torch.arange(reach, device=x.device)
        )
        x = _lines(x, choice.images, places.clamp(0, size - 1))
        if before or after:
            # Padding is zeros.
            x = x * ((places >= 0) & (places < size)).view(-1, *(1,) * (self._axes - 1))
        return x, self.geometry._replace(padding=((0, 0), *self.geometry.padding[1:]))


def _lines(x: Tensor, images: Tensor | None, places: Tensor) -> Tensor:
    """``[n, channels, lines, ...]``: chosen images, or all, at some places of their first axis."""
    x = x if images is None else x.index_select(0, images)
    return x.index_select(2, places)


def _step(turn: int) -> int:
    """A step through a turn that visits all of it, and soon the most distant parts."""
    step = max(1, round(GOLDEN * turn))
    while math.gcd(step, turn) > 1:
        step += 1
    return step


@dataclass(frozen=True)
class PatchMaps:
    """Which positions of an image lie under which taps of a kernel, in all its patches.

    Attributes:
        positions: Of the kernel in an image, the rows of a sample.
        axes: For each axis ``[kernel, size]``: how often a position lies under a tap.
        root: ``[*spatial]``, the root of how many taps a position lies under.
    """

    positions: int
    axes: tuple[Tensor, ...]
    root: Tensor

    def sums(self, images: Tensor) -> Tensor:
        """``[parts, channels * taps]``: sums of the patches of ``[parts, channels, *spatial]``."""
        with torch.autocast(images.device.type, enabled=False):
            for axis in self.axes:
                # The axis goes to the end, so that the next one is in its place.
                images = torch.tensordot(images, axis, dims=([2], [1]))
        return images.flatten(1)

    def norm(self, images: Tensor) -> Tensor:
        """0-dim, of all patches' entries, from ``[n, channels, *spatial]``."""
        some = max(1, SLAB // max(1, images[0].numel()))
        return norm_of([part.to(self.root.dtype) * self.root for part in images.split(some)])


def patch_maps(
    sizes: torch.Size, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> PatchMaps:
    """The maps of a convolution, made once for each size of images."""
    make = _maps.__wrapped__ if is_tracing() else _maps
    return make(tuple(sizes), geometry, dtype, device)


@lru_cache(maxsize=256)
def _maps(
    sizes: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> PatchMaps:
    positions = math.prod(geometry.outputs(sizes))
    axes = tuple(_axis_map(axis, geometry.mode, dtype, device) for axis in geometry.axes(sizes))
    cover = axes[0].new_ones(1, 1)
    for axis in axes:
        cover = cover.flatten().unsqueeze(1) * axis.sum(0)
    return PatchMaps(positions, axes, cover.view(sizes).sqrt())


def _axis_map(axis: Axis, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[kernel, size]``: how often each position of an axis lies under each kernel tap."""
    size, (before, after) = axis.size, axis.padding
    if mode == "zeros":
        padded = torch.arange(-before, size + after, device=device)
        padded = padded.where((padded >= 0) & (padded < size), size)
    else:
        places = torch.arange(size, dtype=torch.float32, device=device).view(1, 1, size)
        padded = F.pad(places, axis.padding, mode).view(-1).long()
    taps = padded.unfold(0, axis.reach, axis.stride)[:, :: axis.dilation]
    counts = torch.zeros(size + 1, axis.kernel, dtype=dtype, device=device)
    counts.scatter_add_(0, taps, torch.ones_like(taps, dtype=dtype))
    return counts[:size].mT.contiguous()
