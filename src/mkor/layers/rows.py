"""Which rows of a batch become statistics vectors.

Samples lie along the first dimension. Every update makes at most ``k`` vectors (``vectors``); each
is the sum over one part of the samples, and is divided by the part's number of rows later, when
all calls, micro-batches and processes have added theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mkor.memo import memo
from mkor.native import Parts

__all__ = ["Chunks", "part_sizes", "parts_of", "place", "place_chunks", "sum_parts", "take_parts"]


class Chunks(NamedTuple):
    """Equal chunks of neighbouring samples: chunk ``j`` starts at ``offset + j * stride``.

    Attributes:
        parts: Number of chunks, ``k``.
        size: Samples per chunk.
        stride: Distance of the starts of neighbouring chunks, at least ``size``.
        slack: Largest offset; the chunks then end at the last sample.
    """

    parts: int
    size: int
    stride: int
    slack: int

    @property
    def turn(self) -> int:
        """Updates in which every sample is visited."""
        return -(-self.slack // self.size) + 1

    def offset(self, update: int | Tensor) -> int | Tensor:
        """Where the first chunk starts in a given update.

        Args:
            update: Number of updates so far: an int, or a tensor in compiled code.

        Returns:
            Offsets step through the samples in strides of one chunk, so that a full turn visits
            every sample.
        """
        start = (update % self.turn) * self.size
        return start.clamp(max=self.slack) if isinstance(start, Tensor) else min(start, self.slack)

    def indices(self, update: int | Tensor, device: torch.device) -> Tensor:
        """The samples of every chunk.

        Args:
            update: Number of updates so far.
            device: Where the samples are.

        Returns:
            ``[parts, size]``.
        """
        starts = torch.arange(self.parts, device=device) * self.stride + self.offset(update)
        return starts.unsqueeze(1) + torch.arange(self.size, device=device)


def place_chunks(samples: int, count: int, size: int) -> Chunks | None:
    """Spread ``count`` chunks of ``size`` samples over a batch.

    Args:
        samples: Samples in the batch.
        count: Number of chunks, ``k``.
        size: Samples per chunk.

    Returns:
        The placement, or None when the batch has fewer than ``count * size`` samples and is cut
        into ``count`` nearly equal parts instead.
    """
    if samples < count * size:
        return None
    stride = samples // count
    return Chunks(count, size, stride, samples - (count - 1) * stride - size)


def part_sizes(samples: int, count: int) -> list[int]:
    """Sizes of nearly equal parts, as ``tensor_split`` makes them.

    Args:
        samples: Samples to share out.
        count: Number of parts.

    Returns:
        ``count`` numbers, the larger first; some are 0 when there are fewer samples than parts.
    """
    small, larger = samples // count, samples % count
    return [small + (part < larger) for part in range(count)]


@memo(maxsize=256)
def place(samples: int, count: int, size: int | None) -> tuple[Chunks | None, list[int]]:
    """Spread chunks over a batch, or cut it into parts.

    Args:
        samples: Samples in the batch.
        count: Number of chunks or parts, ``k``.
        size: Samples per chunk; None to use all.

    Returns:
        The chunks, None for nearly equal parts, and the number of samples in each.
    """
    chunks = None if size is None else place_chunks(samples, count, size)
    return chunks, [size] * count if chunks and size else part_sizes(samples, count)


def parts_of(samples: int, count: int, chunks: Chunks | None, update: int, unit: int) -> Parts:
    """The same choice of samples as :func:`take_parts` makes, for kernels.

    Args:
        samples: Samples in the batch.
        count: Number of parts, ``k``.
        chunks: Chosen chunks, or None for the whole batch in ``count`` nearly equal parts.
        update: Number of updates so far.
        unit: Rows of a sample.

    Returns:
        The parts.
    """
    if chunks is None:
        small, larger = divmod(samples, count)
        return Parts(count, small, small, 0, larger, unit)
    return Parts(count, chunks.size, chunks.stride, int(chunks.offset(update)), 0, unit)


def take_parts(
    x: Tensor, count: int, chunks: Chunks | None, update: int, dim: int = 0
) -> list[Tensor]:
    """The chosen samples, as few tensors of equal parts, without copying any.

    Args:
        x: ``[..., samples, ...]``.
        count: Number of parts, ``k``.
        chunks: Chosen chunks, or None for the whole batch in ``count`` nearly equal parts.
        update: Number of updates so far.
        dim: Along which the samples lie.

    Returns:
        Views ``[..., parts, samples per part, ...]`` whose numbers of parts add up to that of the
        parts that are not empty.
    """
    shape, strides = x.shape, x.stride()
    if chunks is not None:
        step = strides[dim]
        start = x.storage_offset() + int(chunks.offset(update)) * step
        sizes = (*shape[:dim], chunks.parts, chunks.size, *shape[dim + 1 :])
        steps = (*strides[:dim], chunks.stride * step, step, *strides[dim + 1 :])
        return [x.as_strided(sizes, steps, start)]
    small, larger = shape[dim] // count, shape[dim] % count
    if small and not larger:
        return [x.unflatten(dim, (count, small))]
    cut = larger * (small + 1)
    runs = []
    if larger:
        runs.append(x.narrow(dim, 0, cut).unflatten(dim, (larger, small + 1)))
    if small:
        rest = x.narrow(dim, cut, shape[dim] - cut)
        runs.append(rest.unflatten(dim, (count - larger, small)))
    return runs


def sum_parts(
    runs: Sequence[Tensor], reduce: Callable[[Tensor], Tensor], count: int, dim: int = 0
) -> Tensor:
    """Reduce every part and give each its slot.

    Args:
        runs: What :func:`take_parts` returned.
        reduce: Maps ``[..., parts, samples, ...]`` to ``[..., parts, ...]``.
        count: Number of slots, ``k``.
        dim: Along which the parts lie.

    Returns:
        ``[..., count, ...]``; slots without a part hold 0.
    """
    sums = [reduce(run) for run in runs]
    filled = sums[0] if len(sums) == 1 else torch.cat(sums, dim)
    missing = count - filled.shape[dim]
    if not missing:
        return filled
    empty = filled.new_zeros(*filled.shape[:dim], missing, *filled.shape[dim + 1 :])
    return torch.cat([filled, empty], dim)
