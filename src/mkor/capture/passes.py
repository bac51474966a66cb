"""What the hooks of one optimizer share: whether passes count, how many there were, their ends."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mkor._torch import at_end_of_backward, backward_pass, running_ddp
from mkor.capture.buffer import StatisticsBuffer
from mkor.capture.output_layer import OutputSearch
from mkor.layers.layer import LayerKind
from mkor.layers.rows import RowSelection, Sums


class BackwardPasses:
    """Counts a step's backward passes, which are its micro-batches, and sees them end.

    Passes are counted by layer: an expert without tokens sees fewer. Gradients that are sharded
    (FSDP2) accumulate only in passes that synchronise them, so there the layers' own hooks count.

    Attributes:
        buffer: Gets the sums when a pass ends.
        early: Whether sums are sent when the first pass of a step has ended that synchronised the
            gradients with those of other processes.
        unsent: Whether anything was captured since they were.
        synchronised: Passes of the step that synchronised the gradients.
    """

    def __init__(self, buffer: StatisticsBuffer) -> None:
        self.buffer = buffer
        self.early = self.unsent = False
        self.synchronised = 0
        self._counts: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._open: set[int] = set()
        self._ended = self._sharded = False
        self._ddp: weakref.ref[DistributedDataParallel] | None = None

    @property
    def most(self) -> int:
        """Passes through the layer that saw most."""
        return max(self._counts.values(), default=0)

    def begin(self) -> None:
        """Begin a new step."""
        self.unsent = False
        self.synchronised = 0
        self._counts.clear()
        self._last.clear()
        # A pass that raised never ended.
        self._open.clear()
        self._ended = self._sharded = False

    def see_forward(self) -> None:
        """Note, in a layer's forward pass, which ``DistributedDataParallel`` it runs in."""
        if self._ddp is None or self._ddp() is None:
            ddp = running_ddp()
            self._ddp = None if ddp is None else weakref.ref(ddp)

    def captured(self, key: Hashable, counts: bool) -> None:
        """A call was captured, whose pass is counted here, at most once a layer, if ``counts``."""
        task = backward_pass()
        self.unsent = True
        if counts and self._last.get(key) != task:
            self._last[key] = task
            self._counts[key] = self._counts.get(key, 0) + 1
        if task < 0:
            self.buffer.flush()
        self._wait_for_end(task)

    def accumulated(self, key: Hashable, sharded: bool) -> None:
        """The gradient of a layer's weight was accumulated, of a shard or of the whole."""
        task = backward_pass()
        if not sharded:
            self.unsent = True
            self._counts[key] = self._counts.get(key, 0) + 1
            self._wait_for_end(task)
            return
        if not self._ended:
            # A layer without rows has no hook that would.
            self._wait_for_end(task)
        self._sharded = True
        if self._ended:
            self._end()

    def _wait_for_end(self, task: int) -> None:
        if task < 0 or task in self._open:
            return
        if not self._open:
            self._ended = self._sharded = False
        self._open.add(task)
        at_end_of_backward(partial(self._close, task))

    def _close(self, task: int) -> None:
        self._open.discard(task)
        self.buffer.flush()
        # Reentrant checkpointing runs passes inside the pass.
        if not self._open:
            self._ended = True
            self._end()

    def _end(self) -> None:
        ddp = None if self._ddp is None else self._ddp()
        if not (self._sharded or (ddp is not None and ddp.require_backward_grad_sync)):
            return
        self._ended = self._sharded = False
        self.synchronised += 1
        if self.early and self.synchronised == 1:
            self.unsent = False
            self.buffer.launch()


class CaptureContext:
    """Whether and how calls are captured, the same for all hooks of an optimizer.

    Args:
        passes: Backward passes since the last step.
        sides: Whether ``a`` and ``g`` are captured.
        covariance: Whether all rows' outer products are, instead of sums of some rows.

    Attributes:
        enabled: Whether passes count at present.
        search: The search for the output layers while it is on.
        calls: Times a hook ran since the last step, not counting compiled ones.
    """

    def __init__(self, passes: BackwardPasses, sides: tuple[bool, bool], covariance: bool) -> None:
        self.passes = passes
        self.search: OutputSearch | None = None
        self.calls = 0
        self.enabled = True
        self._right, self._left = sides
        self._covariance = covariance
        self._paused = 0
        self._wanted = True

    @property
    def captures_inputs(self) -> bool:
        """Whether ``a`` is captured."""
        return self._right

    def inputs(self, kind: LayerKind, x: Tensor, selection: RowSelection) -> Sums | None:
        """What is taken from a call's input; None where that side is not captured."""
        if not self._right:
            return None
        return kind.input_moments(x) if self._covariance else kind.input_sums(x, selection)

    def outputs(self, kind: LayerKind, g: Tensor, selection: RowSelection) -> Sums | None:
        """What is taken from the gradient of a call's output."""
        if not self._left:
            return None
        return kind.output_moments(g) if self._covariance else kind.output_sums(g, selection)

    def want(self, wanted: bool) -> None:
        """Say whether the coming passes belong to an update."""
        self._wanted = wanted
        self.enabled = wanted and not self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Passes inside the context do not count; nests."""
        self._paused += 1
        self.enabled = False
        try:
            yield
        finally:
            self._paused -= 1
            self.want(self._wanted)
