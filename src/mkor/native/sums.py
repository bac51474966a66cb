"""Sums over rows, patches and output positions: ``rows.h`` and ``images.h``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mkor.native.loading import kernels

__all__ = ["Parts", "add_call", "line_sums", "patch_sums", "row_sums"]

Lines = tuple[int, int]
"""The first line and their number."""


class Parts(NamedTuple):
    """Parts of neighbouring samples: the first ``extra`` have one sample more than the others.

    Attributes:
        vectors: Number of parts, ``k``.
        size: Samples of a part.
        stride: Distance of the starts of neighbouring parts, beside the extra samples before.
        offset: Where the first part starts.
        extra: Parts with one sample more.
        unit: Rows of a sample.
    """

    vectors: int
    size: int
    stride: int
    offset: int = 0
    extra: int = 0
    unit: int = 1


def row_sums(xs: Sequence[Tensor], parts: Parts) -> tuple[Tensor, Tensor]:
    """Sums of the rows of each part, and of the squares of all their entries.

    Args:
        xs: ``n`` tensors ``[..., d]`` that are alike.
        parts: Of their rows.

    Returns:
        ``[n, k, d]`` and ``[n]``.
    """
    d = xs[0].shape[-1]
    return _each(kernels().row_sums, xs, (d, *parts), parts.vectors, d)


def patch_sums(
    xs: Sequence[Tensor], axes: Sequence[tuple[int, int, int, int, int]], lines: Lines, parts: Parts
) -> tuple[Tensor, Tensor]:
    """Sums of the patches under some lines of the output, by parts of the images.

    Args:
        xs: ``n`` tensors ``[images, channels, height, width]`` that are alike.
        axes: Of both axes: kernel, stride, dilation, padding with zeros before, size of the output.
        lines: Of the output.
        parts: Of the images.

    Returns:
        ``[n, k, channels * kernel positions]``, and ``[n]``: sums of the squares of all entries.
    """
    image = tuple(xs[0].shape[1:])
    kernel, stride, dilation, before, (_, across) = zip(*axes, strict=True)
    geometry = (image, kernel, stride, dilation, before, (*lines, across), parts)
    d = image[0] * kernel[0] * kernel[1]
    return _each(kernels().patch_sums, xs, geometry, parts.vectors, d)


def line_sums(gs: Sequence[Tensor], lines: Lines, parts: Parts) -> tuple[Tensor, Tensor]:
    """Sums over some lines of images, by parts of these.

    Args:
        gs: ``n`` tensors ``[images, channels, height, width]`` that are alike.
        lines: Of each image.
        parts: Of the images.

    Returns:
        ``[n, k, channels]``, and ``[n]``: sums of the squares of all entries.
    """
    image = tuple(gs[0].shape[1:])
    return _each(kernels().line_sums, gs, (image, tuple(lines), parts), parts.vectors, image[0])


def _each(
    kernel: Callable[..., None], xs: Sequence[Tensor], how: tuple[Any, ...], k: int, d: int
) -> tuple[Tensor, Tensor]:
    """``[n, k, d]`` and ``[n]``, filled by a kernel for each tensor."""
    sums, squares = xs[0].new_empty(len(xs), k, d), xs[0].new_empty(len(xs))
    into, square = sums.data_ptr(), squares.data_ptr()
    for i, x in enumerate(xs):
        kernel(x.data_ptr(), *how, into + 4 * i * k * d, square + 4 * i)
    return sums, squares


def add_call(
    both: tuple[Tensor, Tensor],
    parts: Parts,
    total: int,
    into: tuple[int, int, int],
    kept: tuple[Tensor, Tensor] | None,
) -> None:
    """Add the sums of a call's inputs and output gradients to their places.

    Args:
        both: Of the call, ``[..., d_in]`` and ``[..., d_out]``.
        parts: Of their rows.
        total: Rows of the call, used or not.
        into: Addresses of the places of both, ``[k, d]``, 0 for one that is left out, and of the
            counts, see :class:`mkor.capture.gate.Site`.
        kept: ``[k, d_in]`` and 0-dim, filled with the sums of inputs and of their squares; or None.
    """
    a, g = both
    kernels().add_call(
        a.data_ptr(),
        g.data_ptr(),
        a.shape[-1],
        g.shape[-1],
        *parts,
        total,
        *into,
        *((0, 0) if kept is None else (x.data_ptr() for x in kept)),
    )
