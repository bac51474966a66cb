"""The sums of an update's statistics: where they lie, how calls add to them, how processes share.

Per device and dtype there is one flat buffer of fixed layout: for every group of layers its sums of
``a`` and of raw ``g``, and behind them for all layers the squares and counts. It holds sums, not
means, so that unequal batches, micro-batches, and layers used on one process only come out right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mkor._torch import span
from mkor.distributed.communicator import Communicator, Pending
from mkor.layers.layer import GroupShape, LayerKind
from mkor.layers.rows import RowSelection, Sums

SCALARS = 3
"""Numbers that lead a layer's counts: squares of ``a`` and of ``g``, rows of the whole step."""


class Totals(NamedTuple):
    """What was summed over an update, by ``P`` sets of processes (1 unless vectors are gathered).

    Attributes:
        a: For each group ``[B, P k, d_in]``; without rows where that side is not captured. A
            covariance ``[d_in, d_in]`` follows the vectors.
        g: For each group ``[B, P k, d_out]`` likewise.
        scalars: ``[N, 3]``: sums of squares of ``a`` and of ``g``, rows of the whole step.
        counts: ``[N, P k]``, rows in each part.
    """

    a: list[Tensor]
    g: list[Tensor]
    scalars: Tensor
    counts: Tensor


class LayerSlot:
    """One layer's place in the buffer, as views into it.

    Attributes:
        kind: How the layer reads as a matrix product.
        a: ``[k, d_in]``, sums of inputs, above a covariance if it is captured.
        g: ``[k, d_out]``, sums of raw output gradients likewise.
        numbers: ``[3 + k]``: squares of ``a`` and of ``g``, rows of the step, rows of each part.
        selection: Which rows of a call are used.
        sharded: Whether processes store parts of the weight, so that its gradients do not tell
            passes.
    """

    def __init__(
        self,
        kind: LayerKind,
        a: Tensor,
        g: Tensor,
        numbers: Tensor,
        selection: RowSelection,
        sharded: bool,
    ) -> None:
        self.kind, self.selection, self.sharded = kind, selection, sharded
        self.a, self.g, self.numbers = a, g, numbers
        self._squares = numbers[0], numbers[1]
        self._total, self._counts = numbers[2:SCALARS], numbers[SCALARS:]

    def vectors(self, sides: tuple[Sums | None, Sums | None]) -> list[tuple[Tensor, Tensor]]:
        """Where the vectors of a call go, and these."""
        pairs = zip((self.a, self.g), sides, strict=True)
        return [(into, sums.vectors) for into, sums in pairs if sums is not None]

    def squares(self, sides: tuple[Sums | None, Sums | None]) -> list[tuple[Tensor, Tensor]]:
        """Where the squares of a call go, and the norms that they are the squares of."""
        pairs = zip(self._squares, sides, strict=True)
        return [(into, sums.norm) for into, sums in pairs if sums is not None]

    def counts(self, sums: Sums) -> list[tuple[Tensor, float]]:
        """Where the numbers of rows of a call go, and these, which the host knows."""
        pairs = [(self._total, float(sums.total))]
        if len(set(sums.counts)) == 1:
            return [*pairs, (self._counts, float(sums.counts[0]))]
        start = 0
        for rows in dict.fromkeys(sums.counts):
            stop = start + sums.counts.count(rows)
            pairs.append((self._counts[start:stop], float(rows)))
            start = stop
        return pairs


class Call(NamedTuple):
    """What one call of a layer left: sums of inputs and of output gradients, if captured."""

    slot: LayerSlot
    sides: tuple[Sums | None, Sums | None]


def add_calls(calls: Collection[Call]) -> None:
    """Add the sums of calls, each of another layer, in a few operations for all of them."""
    vectors = [pair for slot, sides in calls for pair in slot.vectors(sides)]
    squares = [pair for slot, sides in calls for pair in slot.squares(sides)]
    counts = [
        pair
        for slot, (a, g) in calls
        for sums in (a or g,)
        if sums is not None
        for pair in slot.counts(sums)
    ]
    if vectors:
        norms = [norm for _, norm in squares]
        torch._foreach_add_([into for into, _ in vectors], [what for _, what in vectors])
        torch._foreach_addcmul_([into for into, _ in squares], norms, norms)
        torch._foreach_add_([into for into, _ in counts], [number for _, number in counts])


class StatisticsBuffer:
    """The flat buffers of all devices, and their sums over processes.

    Every update takes exactly one collective per buffer, or processes that see different passes
    would wait for each other. Where the gradients are synchronised in the backward pass itself,
    :meth:`launch` begins it at the pass's end, while the last gradients are still under way; else
    :meth:`finish` does. What is captured after a launch goes into the next update.

    Args:
        communicator: The processes.
        gather: Whether every process's sums are kept apart instead of added.

    Attributes:
        flats: One per device and dtype.
        pending: Calls whose sums wait for the end of the backward pass.
    """

    def __init__(self, communicator: Communicator, gather: bool) -> None:
        self.flats: list[Tensor] = []
        self.pending: list[Call] = []
        self._communicator, self._gather = communicator, gather
        self._totals: list[Tensor] = []
        # What was launched: where it is sent from, and where it arrives.
        self._sent: list[Tensor] = []
        self._arriving: list[Tensor] = []
        self._collective: Pending | None = None
        # What was captured after the launch.
        self._late: list[Tensor] = []

    def add_flat(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat buffer."""
        flat = torch.zeros(size, dtype=dtype, device=device)
        self.flats.append(flat)
        self._totals.append(self._apart(flat) if self._gather else flat.unsqueeze(0))
        return flat

    def totals(self, index: int) -> Tensor:
        """``[P, n]`` after :meth:`finish`: the sums by all processes together, or by each."""
        return self._totals[index]

    @torch.no_grad()
    def flush(self) -> None:
        """Add the pending calls; a layer that was called twice takes a second round."""
        waiting, self.pending = self.pending, []
        with span("mkor.capture"):
            while waiting:
                first = {id(call.slot): call for call in reversed(waiting)}
                add_calls(first.values())
                taken = set(map(id, first.values()))
                waiting = [call for call in waiting if id(call) not in taken]

    def launch(self) -> None:
        """Send what was captured so far without waiting, at most once before :meth:`finish`."""
        if not self.flats or self._collective is not None or self._communicator.world_size == 1:
            return
        if not self._sent:
            self._sent = [torch.empty_like(flat) for flat in self.flats]
            sums = [sent.unsqueeze(0) for sent in self._sent]
            self._arriving = list(map(self._apart, self.flats)) if self._gather else sums
        self._add_late()
        torch._foreach_copy_(self._sent, self.flats)
        torch._foreach_zero_(self.flats)
        self._collective = self._begin(self._sent, self._arriving)

    def finish(self, captured: bool) -> None:
        """Leave the totals of what was launched or, if nothing was, of everything captured.

        ``captured`` says whether anything was captured since the launch.
        """
        self.flush()
        if not self.flats:
            return
        if self._collective is None:
            self._add_late()
            self._begin(self.flats, self._totals).wait()
            return
        self._collective.wait()
        self._collective = None
        if captured:
            self._late = [flat.clone() for flat in self.flats]
        torch._foreach_copy_(self._totals, self._arriving)

    def recall(self) -> None:
        """Take back what was launched: the first process captured all of it, as it were."""
        self.flush()
        if self._collective is None:
            return
        self._collective.wait()
        self._collective = None
        if not self._gather and self._communicator.rank == 0:
            torch._foreach_add_(self._totals, self._arriving)

    def clear(self) -> None:
        """Drop what was captured, and what of it is under way."""
        self.pending = []
        if self._collective is not None:
            self._collective.wait()
            self._collective = None
        if self.flats:
            torch._foreach_zero_(self.flats)

    def _add_late(self) -> None:
        if self._late:
            torch._foreach_add_(self.flats, self._late)
            self._late = []

    def _begin(self, flats: list[Tensor], totals: list[Tensor]) -> Pending:
        if self._gather:
            return self._communicator.gather(flats, totals)
        return self._communicator.sum(flats)

    def _apart(self, flat: Tensor) -> Tensor:
        return flat.new_zeros(self._communicator.world_size, len(flat))


class BufferLayout:
    """Where the sums of groups of layers lie in one flat buffer.

    Args:
        shapes: Of the groups.
        vectors: Parts, ``k``.
        captured: For ``a`` and for ``g``, whether it is captured.
        covariance: Whether covariances follow the vectors.
    """

    def __init__(
        self,
        shapes: Sequence[GroupShape],
        vectors: int,
        captured: tuple[bool, bool],
        covariance: bool,
    ) -> None:
        self._vectors = vectors
        self._layers = sum(shape.layers for shape in shapes)
        # Views of one set stay the same from step to step.
        self._alone: tuple[Tensor, Totals] | None = None
        self._sizes: list[tuple[int, int, int]] = []
        for shape in shapes:
            for width, used in zip((shape.d_in, shape.d_out), captured, strict=True):
                rows = (vectors + width * covariance) * used
                self._sizes.append((shape.layers, rows, width))

    @property
    def size(self) -> int:
        """Numbers in the buffer."""
        sums = sum(B * rows * d for B, rows, d in self._sizes)
        return sums + self._layers * (SCALARS + self._vectors)

    def views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Views ``a`` and ``g`` of every group, and ``[N, 3 + k]``, squares and counts."""
        sides, start = [], 0
        for B, rows, d in self._sizes:
            stop = start + B * rows * d
            sides.append(flat[start:stop].view(B, rows, d))
            start = stop
        return sides[::2], sides[1::2], flat[start:].view(self._layers, -1)

    def totals(self, flats: Tensor) -> Totals:
        """What lies in ``[P, n]``, the vectors of all sets one after the other."""
        if len(flats) == 1:
            if self._alone is None or self._alone[0] is not flats:
                a, g, numbers = self.views(flats[0])
                self._alone = flats, Totals(a, g, numbers[:, :SCALARS], numbers[:, SCALARS:])
            return self._alone[1]
        sets = [self.views(flat) for flat in flats.unbind()]
        a, g = (
            [torch.cat(parts, dim=1) for parts in zip(*(one[side] for one in sets), strict=True)]
            for side in (0, 1)
        )
        numbers = torch.stack([one[2] for one in sets])
        counts = numbers[..., SCALARS:].transpose(0, 1).flatten(1)
        return Totals(a, g, numbers[..., :SCALARS].sum(0), counts)
