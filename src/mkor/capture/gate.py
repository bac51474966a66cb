"""What the hooks share: whether passes count, which rows are used, and where sums go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mkor import native
from mkor.capture.output_layer import OutputSearch
from mkor.capture.passes import Passes
from mkor.capture.tray import META, Call, Source, Tray
from mkor.layers.kinds import LayerKind
from mkor.layers.linear import SMALL, LinearKind
from mkor.layers.moments import moments
from mkor.layers.sums import PartSums, Pick, sums_by

__all__ = ["Gate", "Site"]

HELD = 1 << 24
"""Entries of inputs and output gradients that are kept whole until a backward pass ends."""


@dataclass(eq=False)
class Gate:
    """What all hooks of one optimizer share.

    Attributes:
        vectors: Parts per call, ``k``.
        rows: Rows per part and call; None for all.
        now: Which rows the passes of this step use.
        left: Whether ``g`` is captured.
        right: Whether ``a`` is captured.
        covariance: Whether the outer products of all rows are captured with their sums.
        open: Whether passes count at present.
        search: The search for the output layers while it is on.
        calls: Times a hook ran since the last step, not counting compiled ones.
        held: Entries that are kept until the backward pass ends.
        passes: Backward passes since the last step.
    """

    vectors: int
    rows: int | None
    left: bool
    right: bool
    covariance: bool = False
    open: bool = True
    search: OutputSearch | None = None
    calls: int = 0
    held: int = 0
    passes: Passes = field(default_factory=Passes)
    now: Pick = field(init=False)
    _paused: int = field(default=0, repr=False)
    _wanted: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        self.now = self.pick(0)

    def pick(self, update: int | Tensor) -> Pick:
        """Which rows the passes of a step use.

        Args:
            update: Number of updates so far, which moves the chunks of rows.

        Returns:
            The choice.
        """
        return Pick(self.vectors, self.rows, update)

    def begin(self, update: int, rows: int | None) -> None:
        """Choose the rows that the coming passes use.

        Args:
            update: Number of updates so far.
            rows: Rows per part and call; None for all.
        """
        self.rows = rows
        self.now = self.pick(update)

    def inputs(self, kind: LayerKind, x: Tensor, pick: Pick) -> PartSums | None:
        """What is taken from a call's input.

        Args:
            kind: Of the layer.
            x: The input.
            pick: Which rows are used.

        Returns:
            Sums; None where that side is not captured.
        """
        if not self.right:
            return None
        return moments(kind.input_rows(x)) if self.covariance else kind.input_sums(x, pick)

    def outputs(self, kind: LayerKind, g: Tensor, pick: Pick) -> PartSums | None:
        """What is taken from the gradient of a call's output.

        Args:
            kind: Of the layer.
            g: The gradient.
            pick: Which rows are used.

        Returns:
            Sums; None where that side is not captured.
        """
        if not self.left:
            return None
        return moments(kind.output_rows(g)) if self.covariance else kind.output_sums(g, pick)

    def hold(self, site: Site, source: Source, g: Tensor) -> bool:
        """Keep a call's tensors until the pass ends, and sum them then.

        Between the products of a pass, every line of Python finds its code gone from the
        processor's caches: no more is done here than must be. It pays for small layers, and for
        convolutions, whose sums take many operations. Most tensors would be alive at the pass's
        beginning anyway, when memory is fullest; a GPU's is scarcer.

        Args:
            site: Of the layer.
            source: Holds the call's input as ``a``.
            g: The gradient of the output.

        Returns:
            False where the call must be summed at once: there would be too many.
        """
        a, tray = source.a, site.tray
        if self.covariance or not isinstance(a, Tensor) or not (g.is_cpu and tray.trusts):
            return False
        size = a.numel() + g.numel()
        if self.held + size > HELD or (size > 2 * SMALL and isinstance(site.kind, LinearKind)):
            return False
        self.held += size
        self.keep(tray, Call(site.index, (a, g), site.kind, source, a._version + g._version))
        return True

    def keep(self, tray: Tray, call: Call) -> None:
        """Put a call on a tray, to be added when the backward pass ends that is running.

        Args:
            tray: Of the layer's batch.
            call: The call.
        """
        tray.put(call)
        task = torch._C._current_graph_task_id()
        if tray.task != task:
            tray.task, tray.pick = task, self.now
            self.passes.at_end(tray.empty)
            self.passes.at_end(self._let_go)

    def _let_go(self) -> None:
        self.held = 0

    def want(self, wanted: bool) -> None:
        """Say whether the coming passes belong to an update.

        Args:
            wanted: False between updates.
        """
        self._wanted = wanted
        self.open = wanted and not self._paused

    def forget(self) -> None:
        """Begin a new step."""
        self.calls = self.held = 0
        self.passes.forget()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Passes inside the context do not count.

        Yields:
            Nothing.
        """
        self._paused += 1
        self.open = False
        try:
            yield
        finally:
            self._paused -= 1
            self.want(self._wanted)


_Planned = tuple[Sequence[int], Sequence[int], Pick | None, native.Plan | None]


@dataclass(eq=False)
class Site:
    """Where one layer's sums go: views into the flat buffer.

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
