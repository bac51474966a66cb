"""Where one layer's sums go, and how calls get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mkor import native
from mkor.capture.tray import META, Source, Tray
from mkor.layers.kinds import LayerKind
from mkor.layers.sums import PartSums, Pick, sums_by

__all__ = ["Site"]

_Planned = tuple[Sequence[int], Sequence[int], Pick | None, native.Plan | None]


@dataclass(eq=False)
class Site:
    """One layer's sums: views into the flat buffer.

    Attributes:
        kind: How the layer reads as a matrix product.
        a: ``[k, d_in]``, sums of inputs; above ``[d_in, d_in]`` where covariances are captured.
        g: ``[k, d_out]``, sums of raw output gradients; above ``[d_out, d_out]`` likewise.
        meta: ``[3 + k]``: sum of squares of ``a`` and of ``g``, rows of the step, rows per part.
        update: 0-dim tensor, the number of updates so far, for compiled code.
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
    _planned: _Planned = field(default=((), (), None, None), repr=False)

    def begin(self, pick: Pick) -> None:
        """Plan calls like the last one, for that is slow between the products of a pass.

        Args:
            pick: Which rows the coming passes use.
        """
        x_sizes, g_sizes, planned_for, _ = self._planned
        if planned_for is not None:
            self._planned = (x_sizes, g_sizes, pick, self.kind.plan(x_sizes, g_sizes, pick))

    def add_call(self, source: Source, g: Tensor, pick: Pick) -> bool:
        """Sum a call at once by a kernel, which takes no time worth waiting for.

        Args:
            source: Holds the call's input as ``a``, and what is left of it then.
            g: The gradient of the output.
            pick: Which rows are used.

        Returns:
            Whether there was a kernel for it.
        """
        a = source.a
        if self.places is None or not isinstance(a, Tensor) or not native.serves(a, g):
            return False
        x_sizes, g_sizes, planned_for, plan = self._planned
        if pick is not planned_for or a.shape != x_sizes or g.shape != g_sizes:
            # What does not fit is nothing to capture.
            if not self.kind.fits(a, g):
                return True
            plan = self.kind.plan(a.shape, g.shape, pick)
            self._planned = (a.shape, g.shape, pick, plan)
        if plan is None or not native.pays(plan.reads):
            return False
        native.add_call(plan, a, g, self.places)
        # The graph may live on, and be used again; its inputs need not.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        source.a = sums_by(plan, 0, a) if kept and self.places[0] else None
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
