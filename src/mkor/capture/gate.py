"""What the hooks share: whether passes count, which rows are used, and where sums go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from mkor.capture.output_layer import OutputSearch
from mkor.capture.passes import Passes
from mkor.capture.tray import META, Call, Source, Tray
from mkor.layers.kinds import LayerKind
from mkor.layers.linear import SMALL, LinearKind
from mkor.layers.moments import moments
from mkor.layers.sums import PartSums, Pick

__all__ = ["Gate", "Site"]

HELD = 1 << 24
"""Entries of inputs and output gradients that are kept whole until a backward pass ends."""


@dataclass(eq=False)
class Gate:
    """What all hooks of one optimizer share.

    Attributes:
        vectors: Parts per call, ``k``.
        rows: Rows per part and call; None for all.
        left: Whether ``g`` is captured.
        right: Whether ``a`` is captured.
        covariance: Whether the outer products of all rows are captured with their sums.
        open: Whether passes count at present.
        update: Number of updates so far, which moves the chunks of rows.
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
    update: int = 0
    search: OutputSearch | None = None
    calls: int = 0
    held: int = 0
    passes: Passes = field(default_factory=Passes)
    _paused: int = field(default=0, repr=False)
    _wanted: bool = field(default=True, repr=False)

    def pick(self, update: int | Tensor) -> Pick:
        """Which rows the passes of this step use.

        Args:
            update: Number of updates so far.

        Returns:
            The choice.
        """
        if isinstance(update, Tensor):
            return Pick(self.vectors, self.rows, update)
        return _pick(self.vectors, self.rows, update)

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

    def add(self, site: Site, source: Source, g: Tensor) -> bool:
        """Sum a call at once, if there is a kernel for it; see :meth:`mkor.capture.tray.Tray.add`.

        Args:
            site: Of the layer.
            source: Holds the call's input as ``a``.
            g: The gradient of the output.

        Returns:
            Whether it was.
        """
        if self.covariance:
            return False
        return site.tray.add(site.index, site.kind, source, g, self.pick(self.update))

    def keep(self, tray: Tray, call: Call) -> None:
        """Put a call on a tray, to be added when the backward pass ends that is running.

        Args:
            tray: Of the layer's batch.
            call: The call.
        """
        tray.put(call)
        task = torch._C._current_graph_task_id()
        if tray.task != task:
            tray.task, tray.pick = task, self.pick(self.update)
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


@lru_cache(maxsize=8)
def _pick(vectors: int, rows: int | None, update: int) -> Pick:
    return Pick(vectors, rows, update)


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
    """

    kind: LayerKind
    a: Tensor
    g: Tensor
    meta: Tensor
    update: Tensor
    sharded: bool
    index: int
    tray: Tray

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
