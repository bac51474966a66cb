"""Calls of layers, kept until the backward pass ends and then summed one after the other.

Between the products of a pass, each operation of a capture finds its code and its tensors gone from
the processor's caches, and takes several times as long as right after another capture. Small calls
are even stacked: an operation takes the same few microseconds for one layer as for sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mkor.layers.kinds import LayerKind
from mkor.layers.linear import SMALL
from mkor.layers.sums import PartSums, Pick
from mkor.memo import memo
from mkor.profiling import span

__all__ = ["META", "Call", "Source", "Tray"]

META = 3
"""Numbers that lead a layer's counts: squares of ``a`` and of ``g``, rows of the whole step."""


class Source(Protocol):
    """What holds a call's input while the graph lives.

    Attributes:
        a: The input, or what was taken from it.
    """

    a: PartSums | Tensor | None


class Call(NamedTuple):
    """What one call of a layer left.

    Attributes:
        layer: The layer's place in its batch.
        sides: Sums of inputs and of output gradients, None for a side that is not captured; or both
            tensors themselves, not yet summed.
        kind: How these read as rows.
        source: Its ``a`` is the tensor of inputs, and becomes their sums.
        version: Of the tensors together, when they came.
    """

    layer: int
    sides: tuple[PartSums | Tensor | None, PartSums | Tensor | None]
    kind: LayerKind
    source: Source
    version: int = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and output gradients, if both wait to be summed."""
        a, g = self.sides
        return (a, g) if isinstance(a, Tensor) and isinstance(g, Tensor) else None

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody changed its tensors in place since they came."""
        kept = self.tensors
        return kept is None or kept[0]._version + kept[1]._version == self.version

    @property
    def fits(self) -> bool:
        """Whether its tensors are its layer's; a subclass may reshape them."""
        kept = self.tensors
        return kept is None or self.kind.fits(*kept)


class Tray:
    """The calls of a batch of layers.

    Args:
        a: ``[B, k, d_in]``, see :class:`mkor.capture.site.Site`; without rows if inputs are not
            captured.
        g: ``[B, k, d_out]``, likewise of output gradients.
        meta: ``[B, 3 + k]``.

    Attributes:
        trusts: Whether tensors may be kept: no backward pass was seen to change one.
        task: The backward pass whose end empties the tray; None while it is empty.
        pick: Which rows of the kept tensors are used.
    """

    def __init__(self, a: Tensor, g: Tensor, meta: Tensor) -> None:
        self._into, self._meta = (a, g), meta
        self._calls: list[Call] = []
        self.trusts = True
        self.task: int | None = None
        self.pick = Pick(1, None, 0)

    def put(self, call: Call) -> None:
        """Keep a call until the backward pass ends.

        Args:
            call: The call.
        """
        self._calls.append(call)

    def drop(self) -> None:
        """Forget the calls of a pass that did not end."""
        self._calls.clear()
        self.task = None

    @torch.no_grad()
    def empty(self) -> None:
        """Add what was kept."""
        found, self._calls, self.task = self._calls, [], None
        calls = [call for call in found if call.is_unchanged]
        self.trusts = self.trusts and len(calls) == len(found)
        calls = sorted((call for call in calls if call.fits), key=attrgetter("layer"))
        with span("mkor.capture"):
            for run in _runs(calls):
                self._add(run)

    def _add(self, run: Sequence[Call]) -> None:
        """Add calls of neighbouring layers that are alike."""
        here = slice(run[0].layer, run[-1].layer + 1)
        rows = None
        for place, into in enumerate(self._into):
            found = [call.sides[place] for call in run]
            captured = into.shape[1] and found[0] is not None
            sums = _joined(found, run[0].kind, self.pick, place) if captured else None
            if not place:
                _let_go(run, sums)
            if sums is not None:
                into[here].add_(sums.vectors)
                self._meta[here, place].add_(sums.square)
                rows = (sums.total, *sums.counts)
        if rows is not None:
            self._meta[here, META - 1 :].add_(_constant(rows, self._meta.dtype, self._meta.device))


def _joined(found: Sequence[Any], kind: LayerKind, pick: Pick, place: int) -> PartSums:
    """One side's sums of several calls: vectors ``[n, k, d]``, squares ``[n]``."""
    first = found[0]
    if not isinstance(first, Tensor):
        return _stacked(found)
    reduce = kind.output_sums if place else kind.input_sums
    if len(found) > 1 and kind.stacks(first, pick):
        return reduce(found, pick)
    return _stacked([reduce(tensor, pick) for tensor in found])


def _stacked(each: Sequence[PartSums]) -> PartSums:
    first = each[0]
    vectors, square = (torch.stack(side) for side in list(zip(*each, strict=True))[:2])
    return PartSums(vectors, square, first.counts, first.total)


def _let_go(run: Sequence[Call], sums: PartSums | None) -> None:
    """Let sums, or nothing, take the inputs' place: the graph may live on, and be used again."""
    first = run[0].sides[0]
    if isinstance(first, Tensor) and first.numel() > SMALL:
        for layer, call in enumerate(run):
            call.source.a = None if sums is None else sums.of(layer)


def _runs(calls: Sequence[Call]) -> list[list[Call]]:
    """Alike calls of neighbouring layers together."""
    runs: list[list[Call]] = []
    last: Any = None
    for call in calls:
        like = (call.kind, *map(_looks, call.sides))
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
