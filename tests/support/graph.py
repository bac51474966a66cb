"""A CUDA graph on a CPU: operators are noted while a step is captured, and repeated in replays.

As on a GPU, what is captured does not run yet: memory is put back as it was, and new tensors hold
no numbers. Whatever would wait for a device, or copy numbers from the host, raises.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
        *("unique_dim", "_unique2", "bincount", "repeat_interleave"),
        *("cholesky_inverse", "linalg_cholesky", "linalg_inv", "linalg_solve"),
    )
}
"""Operators whose result, its size, or its errors the host waits for on a GPU."""

COPYING = {"aten::lift_fresh"}
"""What begins with numbers of the host."""

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
"""Of tensors: some see memory on a CPU without an operator."""


class ForbiddenError(AssertionError):
    """Something that no captured step may do."""


def forbidden(*_args, **_how):
    raise ForbiddenError("a tensor's value was read")


@contextmanager
def capturing():
    """The package takes the device for one that captures a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mkor._torch.is_capturing", lambda _=None: True)
        yield


@contextmanager
def unread():
    """Reading a tensor's value raises."""
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, forbidden)
        yield


@contextmanager
def watched():
    """Whatever waits for a device, or copies to it or from it, raises; others are counted."""
    with unread(), Operators() as operators:
        yield operators


class Operators(TorchDispatchMode):
    """Runs operators, and raises on those that wait or copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        if name in WAITING or name in COPYING or masks:
            raise ForbiddenError(name)
        self.count += 1
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


class Graph(Operators):
    """Captures what runs inside it; :meth:`replay` runs it, into the memory of the capture."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}

    def run(self, func, args, kwargs):
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t.untyped_storage().data_ptr() not in known for t in _tensors(result)]
        self.calls.append((func, args, kwargs, result, fresh))
        return result

    @contextmanager
    def capture(self):
        """Inside, everything takes itself for captured."""
        with capturing(), unread(), self:
            yield self
        for storage, content in self.before.values():
            storage.copy_(content)
        for *_, result, fresh in self.calls:
            for into, new in zip(_tensors(result), fresh, strict=True):
                if new and into.is_floating_point():
                    into.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result, fresh in self.calls:
            again = func(*args, **kwargs)
            for into, value, new in zip(_tensors(result), _tensors(again), fresh, strict=True):
                if new:
                    into.copy_(value)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _written(func, args, kwargs):
    """The arguments that an operator changes."""
    schema = func._schema.arguments
    values = [*args, *[kwargs.get(a.name) for a in schema[len(args) :]]]
    pairs = zip(schema, values, strict=True)
    return _tensors([v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write])
