"""Hooks: from a running model to sums of a few vectors per layer.

A forward hook notes a layer's input; when the gradient of that call's output arrives, the chosen
rows of both are summed, and added to the layer's slots when the pass ends. Adding in the backward
pass only means that evaluation, recomputation under checkpointing and Lightning's late
``zero_grad`` all count rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mkor.layers import LayerKind
from mkor.linear import LinearKind
from mkor.moments import moments
from mkor.output_layer import OutputSearch
from mkor.passes import Passes
from mkor.profiling import span
from mkor.sums import PartSums, Pick
from mkor.tray import META, SMALL, Call, Tray

__all__ = ["META", "AccumulationHook", "ForwardHook", "Gate", "GradientHook", "InertHook", "Site"]

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

    def may_hold(self, kind: LayerKind, a: Tensor | None, g: Tensor) -> bool:
        """Whether a call's tensors are kept until the pass ends; they then count as held.

        It pays for small layers, and for convolutions, whose sums take many operations. Most would
        be alive at the pass's beginning anyway, when memory is fullest; a GPU's is scarcer.

        Args:
            kind: Of the layer.
            a: The input.
            g: The gradient of the output.

        Returns:
            False if there would be too many.
        """
        size = g.numel() + (0 if a is None else a.numel())
        if self.covariance or g.device.type != "cpu" or self.held + size > HELD:
            return False
        if isinstance(kind, LinearKind) and size > 2 * SMALL:
            return False
        self.held += size
        self.passes.at_end(self._let_go)
        return True

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


class _Tap(torch.autograd.Function):
    """Compiled capture: passes the output on and adds to preallocated tensors in the backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, site: Site, gate: Gate, a: PartSums | None) -> Tensor:
        ctx.site, ctx.gate = site, gate
        ctx.save_for_backward(*(() if a is None else (a.vectors, a.square)))
        ctx.rows = None if a is None else (a.counts, a.total)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gate, site = ctx.gate, ctx.site
        a = PartSums(*ctx.saved_tensors, *ctx.rows) if gate.right else None
        site.add(a, gate.outputs(site.kind, grad.detach(), gate.pick(site.update)))
        return grad, None, None, None


class InertHook:
    """A hook that does nothing once it is copied or pickled with the model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


class ForwardHook(InertHook):
    """A module's forward hook; inert once copied or pickled with the model.

    Args:
        gate: Shared by all hooks of the optimizer.
        key: Identifies the layer's weight in the search for output layers.
        site: Where the sums go; None for a layer that is only watched during that search.
    """

    def __init__(self, gate: Gate, key: Hashable, site: Site | None) -> None:
        self.gate = gate
        self.key = key
        self.site = site

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Sum the input's rows and wait for the gradient.

        Args:
            module: The layer.
            args: Its positional inputs.
            kwargs: Its keyword inputs.
            output: What it returned.

        Returns:
            None, or in compiled code the output passed through.
        """
        gate = self.gate
        if not gate.open or not torch.is_grad_enabled():
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling:
            gate.calls += 1
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        output = output[0] if isinstance(output, tuple) else output
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            return None
        if x.numel() == 0:
            return None
        if compiling:
            return self._compiled(module, x, output)
        if torch._C._functorch.peek_interpreter_stack() is None:
            self._eager(module, x, output)
        return None

    def _eager(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        gate, site = self.gate, self.site
        gate.passes.see_forward()
        search = gate.search
        if search is not None:
            search.forward(self.key, [x], output)
            output.register_hook(lambda _: search.backward(self.key))
        if site is None or not _trains(module):
            return
        a: PartSums | Tensor | None = x
        # What autograd keeps anyway is read with the gradient, the same work twice in a row.
        if not _is_saved(x):
            if not site.kind.fits(x, output):
                return
            with span("mkor.capture"):
                a = gate.inputs(site.kind, x.detach(), gate.pick(gate.update))
        # Cheaper than a hook on the tensor itself, which is kept in a dict of its own.
        node: Any = output.grad_fn
        node.register_prehook(GradientHook(gate, site, a, output.output_nr))

    def _compiled(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        gate, site = self.gate, self.site
        if site is None or not _trains(module) or not site.kind.fits(x, output):
            return None
        a = gate.inputs(site.kind, x.detach(), gate.pick(site.update))
        tapped: Tensor = _Tap.apply(output, site, gate, a)  # type: ignore[no-untyped-call]
        return tapped


class GradientHook:
    """Adds both sides of one call when the gradient of its output arrives.

    Args:
        gate: Shared by all hooks of the optimizer.
        site: Where the sums go.
        a: The call's input, or what was taken from it.
        output: Which output of its operation is the call's.
    """

    __slots__ = ("a", "gate", "output", "site")

    def __init__(self, gate: Gate, site: Site, a: PartSums | Tensor | None, output: int) -> None:
        self.gate, self.site, self.a, self.output = gate, site, a, output

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Add both sides.

        Args:
            grads: Of all outputs of the operation that made the call's output.
        """
        gate, site = self.gate, self.site
        grad = grads[self.output]
        if not gate.open or grad is None:
            return
        with span("mkor.capture"):
            self._capture(grad.detach())
        if site.sharded:
            gate.passes.count(site)

    def _capture(self, grad: Tensor) -> None:
        gate, site, a = self.gate, self.site, self.a
        pick = gate.pick(gate.update)
        if isinstance(a, Tensor):
            if not site.kind.fits(a, grad):
                return
            x = a.detach() if gate.right else None
            # Until its sums take its place. The graph may live on, and be used again.
            self.a = x
            if site.tray.trusts and gate.may_hold(site.kind, x, grad):
                self._keep((x, grad if gate.left else None), pick)
                return
            a = self.a = None if x is None else gate.inputs(site.kind, x, pick)
        g = gate.outputs(site.kind, grad, pick)
        # A captured CUDA graph repeats what ran on the device, and no callbacks.
        if grad.is_cuda and torch.cuda.is_current_stream_capturing():
            site.add(a, g)
        else:
            self._keep((a, g), pick)

    def _keep(
        self, sides: tuple[PartSums | Tensor | None, PartSums | Tensor | None], pick: Pick
    ) -> None:
        site = self.site
        site.tray.put(Call.of(site.index, sides, pick, site.kind, self))
        self.gate.passes.at_end(site.tray.empty)


class AccumulationHook(InertHook):
    """A weight's hook, run when its gradient was accumulated: a pass went through the layer.

    Args:
        gate: Shared by all hooks of the optimizer.
        key: Of the layer.
        sharded: Whether processes store parts of the weight.
    """

    def __init__(self, gate: Gate, key: Hashable, sharded: bool) -> None:
        self.gate, self.key, self.sharded = gate, key, sharded

    def __call__(self, _: Tensor) -> None:
        """Count the pass if passes count."""
        if self.gate.open:
            self.gate.passes.accumulated(self.key, self.sharded)


def _is_saved(x: Tensor) -> bool:
    """Whether autograd keeps a layer's input as it is until the backward pass anyway."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.get_autocast_dtype(kind):
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _trains(module: nn.Module) -> bool:
    # Modules look their parameters up slowly; those that compute a weight have none of that name.
    weight: object = module._parameters.get("weight")
    weight = module.weight if weight is None else weight
    return isinstance(weight, Tensor) and weight.requires_grad


def _inert(*args: Any) -> None:
    """A hook that does nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert
