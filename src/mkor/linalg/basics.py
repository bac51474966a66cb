"""Masks, averages and products that every curvature needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mkor import native

__all__ = [
    "all_finite",
    "all_hold",
    "append_ones",
    "bias_correction",
    "cut",
    "held",
    "joined",
    "momentum_average",
    "readable",
    "times",
    "where",
]


def all_hold(*masks: Tensor) -> bool:
    """Whether masks hold everywhere, as far as that is known without waiting for a device.

    Args:
        masks: Of bools.

    Returns:
        False on a GPU, and while code is compiled.
    """
    # One alone is read as it is: another operator would take as long as what it may save.
    return all(readable(mask) and bool(mask if mask.numel() == 1 else mask.all()) for mask in masks)


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold neither infinities nor NaN, as far as that is known without waiting.

    Args:
        tensors: Whose sums do not leave the dtype's range.

    Returns:
        False on a GPU, and while code is compiled.
    """
    if native.serves(*tensors) and native.pays(sum(tensor.numel() for tensor in tensors)):
        return native.finite(*tensors)
    return all(readable(tensor) and math.isfinite(tensor.sum().item()) for tensor in tensors)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other along the first dimension; one alone is itself, no copy.

    Args:
        tensors: At least one.

    Returns:
        ``[n, ...]``.
    """
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def held(mask: Tensor) -> list[bool]:
    """Where a mask holds, as far as that is known without waiting for a device.

    Args:
        mask: ``[n]`` bool.

    Returns:
        Its entries; False everywhere on a GPU, and while code is compiled.
    """
    return mask.tolist() if readable(mask) else [False] * len(mask)


def readable(x: Tensor) -> bool:
    """Whether the host can look at a tensor at once.

    Args:
        x: Any tensor.

    Returns:
        False on a GPU, and while code is compiled.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def where(mask: Tensor, x: Tensor, other: Tensor | float) -> Tensor:
    """Entries of ``x`` for layers where the mask holds, else ``other``; no copy if it always does.

    Args:
        mask: ``[B]`` bool.
        x: ``[B, ...]``.
        other: Of the same shape, or a number.

    Returns:
        ``[B, ...]``.
    """
    if all_hold(mask):
        return x
    return torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, other)


def cut(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Stretches along the first dimension; where it is all one, in no time.

    Args:
        x: ``[n, ...]``.
        lengths: Their sum is ``n``.

    Returns:
        Views.
    """
    return (x,) if len(lengths) == 1 else tuple(x.split(list(lengths)))


def times(A: Tensor, x: Tensor) -> Tensor:
    """``A x``; as a row, since batched products with a single column take several times as long.

    Args:
        A: ``[B, m, n]``.
        x: ``[B, n]``.

    Returns:
        ``[B, m]``.
    """
    return torch.bmm(x.unsqueeze(1), A.mT).squeeze(1)


def momentum_average(average: Tensor, new: Tensor, momentum: float) -> Tensor:
    """Exponential average ``gamma * average + (1 - gamma) * new`` (not bias-corrected).

    Args:
        average: The running value.
        new: The new value, of the same shape.
        momentum: ``gamma``, in (0, 1).

    Returns:
        The new running value.
    """
    return average.lerp(new, 1.0 - momentum)


def bias_correction(updates: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """The sum ``1 - gamma^t`` of the weights of an exponential average after ``t`` updates.

    Args:
        updates: ``t``, an integer tensor of any shape; 0 is read as 1, so nothing divides by 0.
        momentum: ``gamma``, in (0, 1).
        dtype: Of the result.

    Returns:
        A tensor shaped like ``updates``.
    """
    power = updates.clamp(min=1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # expm1 keeps the digits that 1 - gamma^t loses when gamma is near 1.
    return -torch.expm1(power * math.log(momentum)).to(dtype)


def append_ones(vectors: Tensor) -> Tensor:
    """Mean inputs with the constant 1 that a bias multiplies.

    Args:
        vectors: ``[..., d_in]``.

    Returns:
        ``[..., d_in + 1]``.
    """
    return torch.cat([vectors, torch.ones_like(vectors[..., :1])], dim=-1)
