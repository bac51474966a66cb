"""Calls of layers, kept until the backward pass ends and then summed one after the other.

Between the products of a pass, each operation of a capture finds its code and its tensors gone from
the processor's caches, and takes several times as long as right after another capture. Small calls
are even stacked: an operation takes the same few microseconds for one layer as for sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mkor.layers import LayerKind
from mkor.linear import SMALL
from mkor.memo import memo
from mkor.profiling import span
from mkor.sums import PartSums, Pick

__all__ = ["META", "Call", "Tray"]

META = 3
"""Numbers that lead a layer's counts: squares of ``a`` and of ``g``, rows of the whole step."""


class Call(NamedTuple):
    """What one call of a layer left.

    Attributes:
        layer: The layer's place in its batch.
        sides: Sums of inputs and of output gradients, None for a side that is not captured; or the
            tensors themselves, not yet summed.
        pick: Which of their rows are used.
        kind: How these read as rows.
        source: Its ``a`` is the tensor of inputs, and becomes their sums.
        versions: Of the tensors, when they came.
    """

    layer: int
    sides: tuple[PartSums | Tensor | None, PartSums | Tensor | None]
    pick: Pick
    kind: LayerKind
    source: Any
    versions: tuple[int, ...]

    @staticmethod
    def of(
        layer: int,
        sides: tuple[PartSums | Tensor | None, PartSums | Tensor | None],
        pick: Pick,
        kind: LayerKind,
        source: Any,
    ) -> Call:
        """A call that just came.

        Args:
            layer: The layer's place in its batch.
            sides: Of inputs and of output gradients.
            pick: Which of their rows are used.
            kind: How these read as rows.
            source: Its ``a`` is the tensor of inputs.

        Returns:
            The call.
        """
        return Call(layer, sides, pick, kind, source, _versions(sides))


class Tray:
    """The calls of a batch of layers.

    Args:
        a: ``[B, k, d_in]``, see :class:`mkor.gate.Site`.
        g: ``[B, k, d_out]``.
        meta: ``[B, 3 + k]``.

    Attributes:
        trusts: Whether tensors may be kept: no backward pass was seen to change one.
    """

    def __init__(self, a: Tensor, g: Tensor, meta: Tensor) -> None:
        self._into, self._meta = (a, g), meta
        self._calls: list[Call] = []
        self.trusts = True

    def put(self, call: Call) -> None:
        """Keep a call until the backward pass ends.

        Args:
            call: The call.
        """
        self._calls.append(call)

    def drop(self) -> None:
        """Forget the calls of a pass that did not end."""
        self._calls.clear()

    def empty(self) -> None:
        """Add what was kept."""
        found, self._calls = self._calls, []
        calls = [call for call in found if call.versions == _versions(call.sides)]
        self.trusts = self.trusts and len(calls) == len(found)
        calls.sort(key=lambda call: call.layer)
        with span("mkor.capture"):
            for run in _runs(calls):
                self._add(run)

    def _add(self, run: Sequence[Call]) -> None:
        """Add calls of neighbouring layers that are alike."""
        here = slice(run[0].layer, run[-1].layer + 1)
        rows = None
        for place, into in enumerate(self._into):
            found = [call.sides[place] for call in run]
            if found[0] is None:
                continue
            sums = _joined(found, run, place)
            into[here].add_(sums.vectors)
            self._meta[here, place].add_(sums.square)
            rows = (sums.total, *sums.counts)
        if rows is not None:
            self._meta[here, META - 1 :].add_(_constant(rows, self._meta.dtype, self._meta.device))


def _joined(found: Sequence[Any], run: Sequence[Call], place: int) -> PartSums:
    """One side's sums of several calls: vectors ``[n, k, d]``, squares ``[n]``."""
    first, kind, pick = found[0], run[0].kind, run[0].pick
    if not isinstance(first, Tensor):
        return _stacked(found)
    reduce = kind.output_sums if place else kind.input_sums
    if len(found) > 1 and kind.stacks(first, pick):
        joined = reduce(found, pick)
    else:
        joined = _stacked([reduce(tensor, pick) for tensor in found])
    if not place and first.numel() > SMALL:
        # The graph may live on, and be used again; its inputs need not.
        for layer, call in enumerate(run):
            call.source.a = joined.of(layer)
    return joined


def _stacked(each: Sequence[PartSums]) -> PartSums:
    first = each[0]
    vectors, square = (torch.stack(side) for side in list(zip(*each, strict=True))[:2])
    return PartSums(vectors, square, first.counts, first.total)


def _versions(sides: Sequence[PartSums | Tensor | None]) -> tuple[int, ...]:
    """How often tensors were changed in place, so far."""
    return tuple(side._version for side in sides if isinstance(side, Tensor))


def _runs(calls: Sequence[Call]) -> list[list[Call]]:
    """Alike calls of neighbouring layers together."""
    runs: list[list[Call]] = []
    last: Any = None
    for call in calls:
        like = (call.kind, call.pick, *map(_looks, call.sides))
        if runs and runs[-1][-1].layer + 1 == call.layer and like == last:
            runs[-1].append(call)
        else:
            runs.append([call])
        last = like
    return runs


def _looks(side: PartSums | Tensor | None) -> object:
    if isinstance(side, PartSums):
        return side.total, tuple(side.counts)
    return side if side is None else (side.shape, side.dtype)


@memo(maxsize=64)
def _constant(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)
