"""Which rows of a call become statistics vectors, and their sums; linear layers.

A row is a sample: every token of a sequence, every output position of a convolution. An update
makes at most ``k`` vectors per side. Each is the sum over one part of the rows, and is divided by
the part's number of rows later, when all calls, micro-batches and processes have added theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mkor._torch import is_tracing


class Sums(NamedTuple):
    """Sums over the used rows of one call of a layer, for one side.

    Attributes:
        vectors: ``[k, d]``, the sum of each part's rows, 0 for an empty part; for a covariance
            ``[1 + d, d]``, the sum of all rows above ``sum v v^T``.
        norm: 0-dim, the root of the sum of the squares of all used entries.
        counts: Rows in each of the ``k`` parts.
        total: Rows of the whole call, used or not.
    """

    vectors: Tensor
    norm: Tensor
    counts: list[int]
    total: int


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

    def offset(self, update: Tensor) -> Tensor:
        """Where the first chunk starts in an update: in strides of one chunk, over and over."""
        return ((update % self.turn) * self.size).clamp(max=self.slack)

    def indices(self, update: Tensor) -> Tensor:
        """``[parts * size]``, the samples of all chunks in an update."""
        starts = torch.arange(self.parts, device=update.device) * self.stride + self.offset(update)
        inside = torch.arange(self.size, device=update.device)
        return (starts.unsqueeze(1) + inside).flatten()


class RowSelection:
    """Which rows the backward passes of a step use, for all layers of one device.

    Args:
        vectors: Parts per call, ``k``.
        update: 0-dim tensor, the number of updates so far. It moves the chunks, on the device
            itself, so that compiled code and CUDA graphs move them too.

    Attributes:
        rows: Rows per part and call; None for all rows.
    """

    def __init__(self, vectors: int, update: Tensor) -> None:
        self.vectors, self.update = vectors, update
        self.rows: int | None = None
        self._shares = True
        self._made: dict[Hashable, Tensor] = {}

    def begin(self, rows: int | None, shares: bool) -> None:
        """Prepare for the passes of the next step.

        ``shares`` says whether its calls may share indices: a replayed CUDA graph ends steps of
        which the host knows nothing.
        """
        self.rows, self._shares = rows, shares
        self._made.clear()

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Indices that all calls of a step share, made by the first of them."""
        if not self._shares or is_tracing():
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def place(samples: int, count: int, size: int | None) -> tuple[Chunks | None, list[int]]:
    """Spread ``count`` chunks of ``size`` samples, and the number of samples in each.

    None instead of chunks where all samples are used, in ``count`` nearly equal parts as
    ``tensor_split`` makes them: because ``size`` is None, or the batch has fewer.
    """
    if size is not None and samples >= count * size:
        stride = samples // count
        return Chunks(count, size, stride, samples - (count - 1) * stride - size), [size] * count
    small, larger = samples // count, samples % count
    return None, [small + (part < larger) for part in range(count)]


def split_evenly(x: Tensor, count: int) -> list[Tensor]:
    """All samples as ``[parts, samples per part, ...]``: the larger parts, then the smaller."""
    small, larger = len(x) // count, len(x) % count
    cut = larger * (small + 1)
    runs = []
    if larger:
        runs.append(x[:cut].unflatten(0, (larger, small + 1)))
    if small:
        runs.append(x[cut:].unflatten(0, (count - larger, small)))
    return runs


def sum_parts(runs: Sequence[Tensor], reduce: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """``[count, ...]``: each part of ``runs`` reduced over its samples; 0 where there is none."""
    sums = [reduce(run) for run in runs]
    filled = sums[0] if len(sums) == 1 else torch.cat(sums)
    missing = count - len(filled)
    if not missing:
        return filled
    return torch.cat([filled, filled.new_zeros(missing, *filled.shape[1:])])


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_of(runs: Iterable[Tensor]) -> Tensor:
    """0-dim: the root of the sum of the squares of all entries."""
    norms: list[Tensor] = [torch.linalg.vector_norm(x, dtype=accumulator(x)) for x in runs]
    if len(norms) > 1:
        norms = [torch.linalg.vector_norm(torch.stack(norms))]
    return norms[0]


def moments(slabs: Iterable[Tensor]) -> Sums:
    """Sums of all rows and of their outer products, from slabs ``[n, d]`` of them."""
    summed: Tensor | None = None
    total = 0
    for rows in slabs:
        rows = rows.to(accumulator(rows))
        # Autocast would multiply in half precision.
        with torch.autocast(rows.device.type, enabled=False):
            more = torch.cat([rows.sum(0, keepdim=True), rows.mT @ rows])
        summed = more if summed is None else summed + more
        total += len(rows)
    assert summed is not None
    return Sums(summed, summed[1:].diagonal().sum().sqrt(), [total], total)


@dataclass(frozen=True)
class LinearKind:
    """``nn.Linear``: the last dimension holds features, all others count rows."""

    d_in: int
    d_out: int

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether ``[*, d_in]`` became ``[*, d_out]``; a subclass may do something else."""
        if x.is_nested or x.dim() == 0:
            return False
        return x.shape[-1] == self.d_in and output.shape == (*x.shape[:-1], self.d_out)

    def input_sums(self, x: Tensor, selection: RowSelection) -> Sums:
        """Sums of ``a`` over the selected rows of ``x [*, d_in]``."""
        return _sums(x, selection)

    def output_sums(self, g: Tensor, selection: RowSelection) -> Sums:
        """Sums of raw ``g`` over the same rows of ``g [*, d_out]``."""
        return _sums(g, selection)

    def input_moments(self, x: Tensor) -> Sums:
        """Moments of all rows of ``x [*, d_in]``."""
        return moments([x.reshape(-1, self.d_in)])

    def output_moments(self, g: Tensor) -> Sums:
        """Moments of all rows of ``g [*, d_out]``."""
        return moments([g.reshape(-1, self.d_out)])


def _sums(x: Tensor, selection: RowSelection) -> Sums:
    k = selection.vectors
    x = x.unsqueeze(0) if x.dim() == 1 else x
    lead = x.shape[:-1]
    total = math.prod(lead)
    if selection.rows is None:
        # The cut is along the first dimension: a sequence is never divided.
        _, samples = place(len(x), k, None)
        counts = [n * (total // len(x)) for n in samples]
        runs = split_evenly(x, k)
    else:
        chunks, counts = place(total, k, selection.rows)
        if chunks is None:
            runs = split_evenly(x.reshape(-1, x.shape[-1]), k)
        else:
            runs = [_rows_of(x, chunks, selection).unflatten(0, (k, chunks.size))]
    over = tuple(range(1, runs[0].dim() - 1))
    vectors = sum_parts(runs, lambda run: run.sum(over, dtype=accumulator(x)), k)
    return Sums(vectors, norm_of(runs), counts, total)


def _rows_of(x: Tensor, chunks: Chunks, selection: RowSelection) -> Tensor:
    """``[k m, d]``: the chunks' rows; nothing else of ``x [*, d]`` is read."""
    if x.dim() > 2 and not x.is_contiguous():
        # Flattening would copy the whole batch to read a few rows of it.
        lead = x.shape[:-1]
        flat = selection.once((lead, chunks), lambda: chunks.indices(selection.update))
        return x[_coordinates(flat, lead)]
    flat = selection.once(chunks, lambda: chunks.indices(selection.update))
    return (x if x.dim() == 2 else x.flatten(0, -2)).index_select(0, flat)


def _coordinates(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """What ``unravel_index`` gives, without its tensors on the host."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(flat % size)
        flat = flat // size
    return tuple(reversed(coordinates))
