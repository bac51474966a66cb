"""What the hooks share: whether passes count, which rows are used, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mkor import graphs
from mkor.capture.output_layer import OutputSearch
from mkor.capture.passes import Passes
from mkor.capture.site import Site
from mkor.capture.tray import Call, Source, Tray
from mkor.layers.kinds import LayerKind
from mkor.layers.linear import SMALL, LinearKind
from mkor.layers.moments import moments
from mkor.layers.sums import PartSums, Pick

__all__ = ["Gate"]

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
        captured: Whether a step was captured in a CUDA graph: how many updates there were is then
            known on the device only.
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
    captured: bool = False
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

    def choose(self, site: Site, x: Tensor) -> Pick:
        """Which rows a call uses that is not compiled.

        Args:
            site: Of its layer.
            x: Its input, or the gradient of its output.

        Returns:
            Those of this step; for a CUDA graph, those of whichever step it is replayed in.
        """
        by_device = self.captured or graphs.is_capturing(x)
        return self.pick(site.update) if by_device else self.now

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
