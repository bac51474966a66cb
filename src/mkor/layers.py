"""One description per kind of layer: its matrix, and its rows as sums per part.

A layer computes ``y = W x (+ b)``. Rows are samples: every token of a sequence and every output
position of a convolution. ``a [n, d_in]`` are the inputs and ``g [n, d_out]`` the gradients of the
loss with respect to the outputs, so that ``g^T a`` summed over rows is the weight's gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mkor.rows import Chunks, part_sizes, place_chunks, sum_parts, take_parts

__all__ = ["ConvKind", "LayerKind", "LinearKind", "PartSums", "Pick", "describe"]


@dataclass(frozen=True)
class Pick:
    """Which rows of a call are used.

    Attributes:
        vectors: Number of parts, ``k``.
        rows: Rows per part, ``m``; None for all rows.
        update: Number of updates so far: an int, or a 0-dim tensor in compiled code.
    """

    vectors: int
    rows: int | None
    update: int | Tensor


@dataclass(frozen=True)
class PartSums:
    """Sums over the used rows of one call of a layer, for one side.

    Attributes:
        vectors: ``[k, d]``, the sum of each part's rows; 0 for an empty part.
        square: Sum of the squares of all used entries, a 0-dim tensor.
        counts: Rows in each part.
        total: Rows of the whole call, used or not.
    """

    vectors: Tensor
    square: Tensor
    counts: list[int]
    total: int


class LayerKind(Protocol):
    """How a kind of layer reads as ``y = W x (+ b)``."""

    @property
    def d_in(self) -> int:
        """Columns of ``W``."""

    @property
    def d_out(self) -> int:
        """Rows of ``W``."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether input and output of a call are this layer's; a subclass may reshape them."""

    def input_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of ``a`` over the parts that ``pick`` chooses from the layer's input."""

    def output_sums(self, g: Tensor, pick: Pick) -> PartSums:
        """Sums of raw ``g`` over the same parts, from the gradient of the layer's output."""


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _squares(runs: list[Tensor]) -> Tensor:
    """Sum of all squares; part by part, since a norm over gaps between parts is slow."""
    norms = [
        torch.linalg.vector_norm(run.flatten(2), dim=(1, 2), dtype=_accumulator(run))
        for run in runs
    ]
    return (norms[0] if len(norms) == 1 else torch.cat(norms)).square().sum()


def _image_squares(runs: list[Tensor]) -> Tensor:
    """``[1, channels, *spatial]``: squares summed over images."""
    norms = [torch.linalg.vector_norm(run, dim=(0, 1), dtype=_accumulator(run)) for run in runs]
    return torch.stack(norms).square().sum(0, keepdim=True)


def _choose(x: Tensor, pick: Pick, chunks: Chunks | None) -> list[Tensor]:
    if isinstance(pick.update, Tensor):
        if chunks is not None:
            return [x[chunks.indices(pick.update, x.device)]]
        return take_parts(x, pick.vectors, None, 0)
    return take_parts(x, pick.vectors, chunks, pick.update)


@dataclass(frozen=True)
class LinearKind:
    """``nn.Linear``: the last dimension holds features, all others count rows."""

    d_in: int
    d_out: int

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether ``[*, d_in]`` became ``[*, d_out]``; see :class:`LayerKind`.

        Args:
            x: Input of a call.
            output: Output of the call.

        Returns:
            False for anything else.
        """
        if x.is_nested or x.dim() == 0:
            return False
        return x.shape[-1] == self.d_in and output.shape == (*x.shape[:-1], self.d_out)

    def input_sums(self, x: Tensor, pick: Pick) -> PartSums:
        """Sums of ``a``; see :class:`LayerKind`.

        Args:
            x: ``[*, d_in]``; one dimension is a single row.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_in]``.
        """
        return _row_sums(x, pick)

    def output_sums(self, g: Tensor, pick: Pick) -> PartSums:
        """Sums of raw ``g``; see :class:`LayerKind`.

        Args:
            g: ``[*, d_out]``.
            pick: Which rows are used.

        Returns:
            Vectors ``[k, d_out]``.
        """
        return _row_sums(g, pick)


def _row_sums(x: Tensor, pick: Pick) -> PartSums:
    x = x.unsqueeze(0) if x.dim() == 1 else x
    total = math.prod(x.shape[:-1])
    chunks = None
    if pick.rows is None:
        # The cut is along the first dimension: a sequence is never divided.
        per_sample = math.prod(x.shape[1:-1])
        counts = [n * per_sample for n in part_sizes(x.shape[0], pick.vectors)]
        runs = [run.flatten(1, -2) for run in take_parts(x, pick.vectors, None, 0)]
    else:
        chunks = place_chunks(total, pick.vectors, pick.rows)
        counts = [chunks.size] * pick.vectors if chunks else part_sizes(total, pick.vectors)
        runs = _row_runs(x, pick, chunks)
    vectors = sum_parts(runs, lambda run: run.sum(1, dtype=_accumulator(x)), pick.vectors)
    return PartSums(vectors, _squares(runs), counts, total)


def _row_runs(x: Tensor, pick: Pick, chunks: Chunks | None) -> list[Tensor]:
    if chunks is not None and not isinstance(pick.update, Tensor) and not _flattens(x):
        # Flattening would copy the whole batch to read a few rows of it.
        return [x[_coordinates(chunks.indices(pick.update, x.device), x.shape[:-1])]]
    return _choose(x.flatten(0, -2), pick, chunks)


def _coordinates(flat: Tensor, sizes: torch.Size) -> tuple[Tensor, ...]:
    """What ``unravel_index`` gives, without its tensors on the host."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(flat % size)
        flat = flat // size
    return tuple(reversed(coordinates))


def _flattens(x: Tensor) -> bool:
    """Whether the leading dimensions merge into one without a copy."""
    lead = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(lead))


@dataclass(frozen=True)
class ConvKind:
    """``nn.Conv1d/2d/3d`` without groups: a row is the patch under one output position.

    A sum of patches is the patch sum of a summed image, and summing one axis' windows is a product
    with a small 0/1 matrix, so no batch is ever unfolded.
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
        sizes = x.shape[2:]
        positions = math.prod([self._outputs(axis, size) for axis, size in enumerate(sizes)])
        runs, counts = self._images(x, pick, positions)
        maps = [self._axis_map(axis, size, x) for axis, size in enumerate(sizes)]
        images = sum_parts(runs, lambda run: run.sum(1, dtype=_accumulator(x)), pick.vectors)
        square = _patch_sums(_image_squares(runs), maps).sum()
        return PartSums(_patch_sums(images, maps).flatten(1), square, counts, len(x) * positions)

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
        runs, counts = self._images(g, pick, positions)
        dims = (1, *range(3, g.dim() + 1))
        vectors = sum_parts(runs, lambda run: run.sum(dims, dtype=_accumulator(g)), pick.vectors)
        return PartSums(vectors, _squares(runs), counts, len(g) * positions)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == len(self.kernel) + 1 else x

    def _images(self, x: Tensor, pick: Pick, positions: int) -> tuple[list[Tensor], list[int]]:
        chunks = None
        if pick.rows is not None:
            per_chunk = max(1, round(pick.rows / max(1, positions)))
            chunks = place_chunks(len(x), pick.vectors, per_chunk)
        sizes = [chunks.size] * pick.vectors if chunks else part_sizes(len(x), pick.vectors)
        return _choose(x, pick, chunks), [n * positions for n in sizes]

    def _outputs(self, axis: int, size: int) -> int:
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + sum(self.padding[axis]) - span) // self.stride[axis] + 1

    def _axis_map(self, axis: int, size: int, like: Tensor) -> Tensor:
        # The compiler folds the map into the graph and warns of caches.
        build = _axis_map.__wrapped__ if torch.compiler.is_compiling() else _axis_map
        shape = (self.kernel[axis], self.stride[axis], self.dilation[axis], self.padding[axis])
        return build(size, *shape, self.padding_mode, _accumulator(like), like.device)


@lru_cache(maxsize=256)
def _axis_map(
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    padding_mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``[size, kernel]``: how often each position of an axis lies under each kernel tap."""
    where = torch.arange(size, dtype=torch.float32, device=device).view(1, 1, size)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(where, padding, mode, size if mode == "constant" else None)
    taps = padded.view(-1).unfold(0, dilation * (kernel - 1) + 1, stride)[:, ::dilation]
    counts = torch.zeros(size + 1, kernel, dtype=dtype, device=device)
    return counts.scatter_add_(0, taps.long(), torch.ones_like(taps, dtype=dtype))[:size]


def _patch_sums(images: Tensor, maps: list[Tensor]) -> Tensor:
    """``[k, channels, *spatial]`` to ``[k, channels, *kernel]``, one axis at a time."""
    with torch.autocast(images.device.type, enabled=False):
        for axis_map in maps:
            images = torch.tensordot(images, axis_map, dims=([2], [0]))
    return images


def _paddings(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


def describe(module: nn.Module) -> LayerKind | str | None:
    """The kind of a layer, if mkor preconditions it.

    Args:
        module: Any module; subclasses of the supported ones count.

    Returns:
        Its description, or the reason why a layer that is nearly one is left to the base
        optimizer, or None for everything else.
    """
    if isinstance(module, nn.Linear):
        return LinearKind(module.in_features, module.out_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return "grouped convolution: every group would need factors of its own"
        kernel = module.kernel_size
        return ConvKind(
            d_in=module.in_channels * math.prod(kernel),
            d_out=module.out_channels,
            kernel=kernel,
            stride=module.stride,
            dilation=module.dilation,
            padding=_paddings(module),
            padding_mode=module.padding_mode,
        )
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention bypasses its layers' hooks"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: not a supported kind of layer"
    return None
