"""CUDA graphs: what runs while one is captured runs on the device alone, again in every replay."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["is_capturing", "refuse"]


def is_capturing(tensor: Tensor | None = None) -> bool:
    """Whether what is launched now is captured, to run in the graph's replays and not yet.

    Args:
        tensor: What it works on; None for any device's.

    Returns:
        False wherever there is no GPU.
    """
    # Asking the driver raises where there is none; until something runs there, nothing is captured.
    gpu = torch.cuda.is_initialized() if tensor is None else tensor.is_cuda
    return gpu and bool(torch.cuda.is_current_stream_capturing())


def refuse(reason: str) -> NoReturn:
    """Say why a step cannot be captured.

    Args:
        reason: What is wrong, and what would be right.

    Raises:
        RuntimeError: In any case.
    """
    raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}")
