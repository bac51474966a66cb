"""Kernels for what is small and often in a step, on a CPU and in float32.

Between the products of a step an operator on a few numbers takes 40 to 130 microseconds, since its
code and its tensors are gone from the processor's caches: a dozen of them take longer than what
they compute. Each function here is one call of ``kernels.c`` in their place; products of matrices
stay with torch. The kernels are compiled when the package is installed. Where that was not
possible, and for other devices and dtypes, torch's operators compute the same; the environment
variable ``MKOR_NATIVE=0`` says so for everything.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ONE_THREAD = 1 << 20
"""Numbers that one thread reads in less time than it takes to wake others."""

__all__ = [
    "Parts",
    "Side",
    "add_call",
    "check",
    "count",
    "gather",
    "in_use",
    "joint_norms",
    "line_sums",
    "patch_sums",
    "pays",
    "ratio",
    "remove_bias",
    "remove_rows",
    "root",
    "row_sums",
    "scatter",
    "serves",
    "update_window",
]


def _load() -> ModuleType | None:
    if os.environ.get("MKOR_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("mkor.native._kernels")
    except ImportError:
        return None


_kernels = _load()


def in_use() -> bool:
    """Whether the kernels were compiled and not switched off.

    Returns:
        False where torch's operators do everything.
    """
    return _kernels is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can work on tensors.

    Args:
        tensors: Any.

    Returns:
        Whether all are dense float32 on a CPU, and hold numbers: no fakes, nothing being traced.
    """
    if _kernels is None or torch.compiler.is_compiling():
        return False
    # A loop: this is asked for every call of every layer.
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_cpu or type(x) is not Tensor:
            return False
        # Some gradients have no memory (`sgn`), some are read with the other sign.
        if not x.is_contiguous() or x._is_zerotensor() or x.is_neg():
            return False
    return True


def pays(entries: int) -> bool:
    """Whether a kernel, which has one thread, is faster than torch's operators.

    Args:
        entries: Numbers that it would read.

    Returns:
        False where these are many and torch has several threads.
    """
    return entries <= ONE_THREAD or torch.get_num_threads() == 1


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
    return _each(_call().row_sums, xs, (d, *parts), parts.vectors, d)


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
    return _each(_call().patch_sums, xs, geometry, parts.vectors, d)


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
    return _each(_call().line_sums, gs, (image, tuple(lines), parts), parts.vectors, image[0])


Lines = tuple[int, int]
"""The first line and their number."""


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
    x: tuple[Tensor, Tensor],
    parts: Parts,
    total: int,
    into: tuple[int, int, int],
    kept: Tensor | None,
) -> None:
    """Add the sums of a call's inputs and output gradients to their places.

    Args:
        x: Both, ``[..., d_in]`` and ``[..., d_out]``.
        parts: Of their rows.
        total: Rows of the call, used or not.
        into: Addresses of the places of both, ``[k, d]``, 0 for one that is left out, and of the
            counts, see :class:`mkor.capture.gate.Site`.
        kept: ``[k d_in + 1]``, filled with the sums of inputs and of their squares; or None.
    """
    a, g = x
    _call().add_call(
        a.data_ptr(),
        g.data_ptr(),
        a.shape[-1],
        g.shape[-1],
        *parts,
        total,
        *into,
        0 if kept is None else kept.data_ptr(),
    )


def check(meta: Tensor, norms: Tensor, seen: Tensor, finite: Tensor, bad: Tensor) -> None:
    """See :meth:`mkor.step.roster.Roster.check`.

    Args:
        meta: ``[N, 3 + k]``.
        norms: ``[N]``, of the raw gradients.
        seen: ``[N]`` bool, overwritten.
        finite: ``[N]`` bool, overwritten.
        bad: 0-dim bool, overwritten.
    """
    N, k = meta.shape[0], meta.shape[1] - 3
    tensors = (meta, norms, seen, finite, bad)
    _call().check(N, k, *(x.data_ptr() for x in tensors))


def count(
    scale: float,
    refuse: Tensor,
    meta: Tensor,
    widths: Tensor,
    seen: Tensor,
    numbers: Tensor,
    filled: Tensor,
    accept: Tensor,
) -> bool:
    """See :meth:`mkor.step.roster.Roster.count`.

    Args:
        scale: What raw ``g`` is multiplied with beside the number of rows.
        refuse: 0-dim bool, whether nothing is learned.
        meta: ``[N, 3 + k]``.
        widths: ``[3, N]``: ``d_out``, ``d_in`` with the column of ones, whether there is one.
        seen: ``[N]`` bool.
        numbers: ``[(4 + 2 k) N]``, overwritten with used rows, scales of raw ``g``, mean squares of
            both sides, rows by vector and scales by vector.
        filled: ``[N, k]`` bool, overwritten.
        accept: ``[N]`` bool, overwritten.

    Returns:
        Whether all slots of all layers are filled and accepted.
    """
    N, k = filled.shape
    tensors = (refuse, meta, widths, seen, numbers, filled, accept)
    return bool(_call().count(N, k, scale, *(x.data_ptr() for x in tensors)))


def ratio(
    average: Tensor, raw: Tensor, norm: Tensor, done: Tensor, momentum: float, running: bool
) -> Tensor:
    """What preconditioned gradients are multiplied with, see :mod:`mkor.step.application`.

    Args:
        average: ``[b, 2]``, running norms, changed in place.
        raw: ``[b]``, norms of the gradients before.
        norm: ``[b]``, and after.
        done: ``[b]`` bool, which were preconditioned.
        momentum: ``gamma``.
        running: Whether it is the ratio of the running norms.

    Returns:
        ``[b]``.
    """
    found = torch.empty_like(raw)
    tensors = (average, raw, norm, done, found)
    _call().ratio(len(raw), running, momentum, *(x.data_ptr() for x in tensors))
    return found


def gather(homes: Sequence[Tensor], W: Tensor, b: Tensor | None) -> None:
    """Copy small gradients side by side.

    Args:
        homes: Weights' gradients, then as many of biases where there are any.
        W: ``[B, ...]``, overwritten.
        b: ``[B, d_out]`` likewise, or None.
    """
    _call().gather(*_stack(W, b), tuple(x.data_ptr() for x in homes))


def scatter(W: Tensor, b: Tensor | None, ratio: Tensor, homes: Sequence[Tensor]) -> None:
    """Multiply each layer's gradients and put them back.

    Args:
        W: ``[B, ...]``.
        b: ``[B, d_out]`` or None.
        ratio: ``[B]``.
        homes: As for :func:`gather`, overwritten.
    """
    addresses = tuple(x.data_ptr() for x in homes)
    _call().scatter(*_stack(W, b), addresses, ratio.data_ptr())


def joint_norms(W: Tensor, b: Tensor | None) -> Tensor:
    """See :func:`mkor.linalg.joint_norm`.

    Args:
        W: ``[B, ...]``.
        b: ``[B, ...]`` or None.

    Returns:
        ``[B]``.
    """
    norm = W.new_empty(len(W))
    _call().joint_norms(*_stack(W, b), norm.data_ptr())
    return norm


def _stack(W: Tensor, b: Tensor | None) -> tuple[int, int, int, int, int]:
    """Layers, entries of each and addresses."""
    n, m = W[0].numel(), 0 if b is None else b.shape[1]
    return len(W), n, m, W.data_ptr(), 0 if b is None else b.data_ptr()


class Side(NamedTuple):
    """One side of a batch of windows, with what comes to it; see :mod:`mkor.curvature.ring`.

    Attributes:
        vectors: ``[B, k, d]``.
        square: ``[B]``.
        rows: ``[B, r, d]``, changed in place as all that follows.
        gram: ``[B, r, r]``.
        mean_square: ``[B]``.
    """

    vectors: Tensor
    square: Tensor
    rows: Tensor
    gram: Tensor
    mean_square: Tensor


def update_window(
    state: dict[str, Tensor],
    filled: Tensor,
    accept: Tensor,
    momentum: float,
    sides: Sequence[Side],
) -> None:
    """Age the windows of a batch and write their new vectors.

    Args:
        state: With ``updates``, ``written`` and ``weights``, changed in place.
        filled: ``[B, k]`` bool.
        accept: ``[B]`` bool; other layers stay as they are.
        momentum: ``gamma``.
        sides: Those in use.
    """
    _call().window_update(
        *filled.shape,
        state["weights"].shape[1],
        momentum,
        filled.data_ptr(),
        accept.data_ptr(),
        state["updates"].data_ptr(),
        state["written"].data_ptr(),
        state["weights"].data_ptr(),
        tuple((side.vectors.shape[2], *(x.data_ptr() for x in side)) for side in sides),
    )


def remove_rows(U: Tensor, b: Tensor) -> None:
    """``b - U^T U b`` in place.

    Args:
        U: ``[B, r, d]``.
        b: ``[B, d]``.
    """
    _call().remove_rows(*U.shape, U.data_ptr(), b.data_ptr())


def remove_bias(Y: Tensor, u: Tensor, b: Tensor) -> None:
    """``Y + b u^T``, and then ``b - Y u``, in place.

    Args:
        Y: ``[B, d, r]``.
        u: ``[B, r]``.
        b: ``[B, d]``.
    """
    B, d, r = Y.shape
    _call().remove_bias(B, r, d, u.data_ptr(), Y.data_ptr(), b.data_ptr())


def root(gram: Tensor, weights: Tensor, mean_square: Tensor, damping: float, one: float) -> Tensor:
    """See :func:`mkor.linalg.whitening_root`.

    Args:
        gram: ``[B, r, r]``.
        weights: ``[B, r]``.
        mean_square: ``[B]``.
        damping: What ``lambda`` is over it.
        one: Added to the Gram matrix.

    Returns:
        ``[B, r, r]``; NaN where the factorisation fails.
    """
    B, r = weights.shape
    A = torch.empty_like(gram)
    pointers = (x.data_ptr() for x in (gram, weights, mean_square, A))
    _call().roots(B, r, damping, one, *pointers)
    return A


def _call() -> ModuleType:
    if _kernels is None:
        raise RuntimeError("the kernels are not compiled: ask `serves` first")
    return _kernels
