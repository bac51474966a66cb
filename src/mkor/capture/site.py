"""Where one layer's sums go, and how calls get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mkor import native
from mkor.capture.passes import graph_is_kept
from mkor.capture.tray import META, Source, Tray
from mkor.layers.kinds import LayerKind
from mkor.layers.sums import PartSums, Pick, sums_by

__all__ = ["Planned", "Site"]


class Planned(NamedTuple):
    """How calls like the last one are summed.

    Attributes:
        kind: Of the layer.
        x, g: Sizes of its input and output.
        pick: Which rows are used; None before the first call.
        plan: For kernels; None where they cannot.
    """

    kind: LayerKind
    x: Sequence[int] = ()
    g: Sequence[int] = ()
    pick: Pick | None = None
    plan: native.Plan | None = None


@dataclass(eq=False)
class Site:
    """One layer's sums: views into the flat buffer.

    Attributes:
        kind: How the layer reads as a matrix product.
        a: ``[k, d_in]``, sums of inputs; above ``[d_in, d_in]`` where covariances are captured.
        g: ``[k, d_out]``, sums of raw output gradients; above ``[d_out, d_out]`` likewise.
        meta: ``[3 + k]``: sum of squares of ``a`` and of ``g``, rows of the step, rows per part.
        update: 0-dim tensor, the number of updates so far, for compiled code and CUDA graphs.
        sharded: Whether processes store parts of the weight, so that its gradients do not tell
            passes.
        index: The layer's place in its batch.
        tray: Where calls wait for those of the batch's other layers.
        places: Addresses of ``a``, ``g`` and ``meta`` for kernels, 0 for a side that is not
            captured; None where no kernel adds calls.
    """

    kind: LayerKind
    a: Tensor
    g: Tensor
    meta: Tensor
    update: Tensor
    sharded: bool
    index: int
    tray: Tray
    places: tuple[int, ...] | None = None
    _planned: Planned = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._planned = Planned(self.kind)

    def begin(self, pick: Pick, other: Planned | None) -> Planned | None:
        """Plan calls like the last one, for that is slow between the products of a pass.

        Args:
            pick: Which rows the coming passes use.
            other: What another layer has planned for them, which may do for this one.

        Returns:
            What this one has; before its first call, that of the other.
        """
        kind, x, g, before, _ = self._planned
        if before is None:
            return other
        if other is not None and other.kind is kind and other.x == x and other.g == g:
            self._planned = other
        else:
            self._planned = Planned(kind, x, g, pick, kind.plan(x, g, pick))
        return self._planned

    def add_call(self, source: Source, g: Tensor, pick: Pick) -> bool:
        """Sum a call at once by a kernel, which takes no time worth waiting for.

        Args:
            source: Holds the call's input as ``a``, and what is left of it then.
            g: The gradient of the output.
            pick: Which rows are used.

        Returns:
            Whether that settles it: there was a kernel, or nothing to capture.
        """
        a = source.a
        if self.places is None or not isinstance(a, Tensor) or not native.serves(a, g):
            return False
        planned = self._planned
        # One pick serves all passes of a step: there is no need to compare what it says.
        if pick is not planned.pick or a.shape != planned.x or g.shape != planned.g:
            if not self.kind.fits(a, g):
                source.a = None
                return True
            plan = self.kind.plan(a.shape, g.shape, pick)
            planned = self._planned = Planned(self.kind, a.shape, g.shape, pick, plan)
        plan = planned.plan
        if plan is None or not native.pays(plan.reads):
            return False
        native.add_call(plan, a, g, self.places)
        captured = self.places[0] != 0
        # The graph may live on, and be used again; its inputs need not.
        source.a = sums_by(plan, 0, a) if captured and graph_is_kept() else None
        return True

    def add(self, a: PartSums | None, g: PartSums | None) -> None:
        """Add one call's sums.

        Args:
            a: Of the inputs; None where that side is not captured.
            g: Of the output gradients.
        """
        if a is not None:
            self.a.add_(a.vectors)
            self.meta[0].add_(a.square)
        if g is not None:
            self.g.add_(g.vectors)
            self.meta[1].add_(g.square)
        rows = a or g
        if rows is None:
            return
        self.meta[2].add_(rows.total)
        if min(rows.counts) == max(rows.counts):
            self.meta[META:].add_(rows.counts[0])
        else:
            for part, count in enumerate(rows.counts):
                self.meta[META + part].add_(count)
