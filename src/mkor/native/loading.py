"""The kernels as they were compiled, if they were, and what they serve."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["address", "addresses", "in_use", "kernels", "pays", "serves", "version"]

ONE_THREAD = 1 << 20
"""Numbers that one thread reads in less time than it takes to wake others."""


address = Tensor.data_ptr
"""Where a tensor's numbers are: ``map(address, tensors)`` runs no line of Python for each."""


def _load() -> ModuleType | None:
    asked = os.environ.get("MKOR_NATIVE", "1")
    if asked == "0":
        return None
    try:
        module = importlib.import_module("mkor.native._kernels")
    except ImportError:
        module = None
    if asked == "1":
        return module
    versions = [] if module is None else module.versions()
    if module is None or asked not in versions:
        known = ", ".join(["0 (none)", "1 (the best there is)", *versions])
        raise ValueError(f"MKOR_NATIVE={asked!r} is not possible here: set one of {known}")
    module.use(asked)
    return module


_kernels = _load()


def in_use() -> bool:
    """Whether the kernels were compiled and not switched off.

    Returns:
        False where torch's operators do everything.
    """
    return _kernels is not None


def version() -> str | None:
    """For which processors the loops that run were compiled.

    Returns:
        ``"avx512"``, ``"avx2"`` or ``"plain"``; None where torch's operators do everything.
    """
    return None if _kernels is None else _kernels.version()


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


def addresses(*tensors: Tensor) -> tuple[int, ...] | None:
    """Where tensors are that stay where they are.

    Args:
        tensors: Any.

    Returns:
        Addresses, 0 of empty tensors; None where kernels do not serve them.
    """
    return tuple(map(address, tensors)) if serves(*tensors) else None


def pays(entries: int) -> bool:
    """Whether a kernel, which has one thread, is faster than torch's operators.

    Args:
        entries: Numbers that it would read.

    Returns:
        False where these are many and torch has several threads.
    """
    return entries <= ONE_THREAD or torch.get_num_threads() == 1


def kernels() -> ModuleType:
    """The compiled module.

    Returns:
        Its functions take addresses.

    Raises:
        RuntimeError: It was not compiled.
    """
    if _kernels is None:
        raise RuntimeError("the kernels are not compiled: ask `serves` first")
    return _kernels
