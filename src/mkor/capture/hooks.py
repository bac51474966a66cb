"""Hooks: from a running model to sums of a few rows per layer.

A forward hook sums the chosen rows of a layer's input; when the gradient of that call's output
arrives, its rows are summed too, and both are added to the buffer when the pass ends. Adding in the
backward pass only means that evaluation, recomputation under checkpointing and Lightning's late
``zero_grad`` all count rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from mkor._torch import is_batch_of_gradients, is_transformed, span
from mkor.capture.buffer import Call, LayerSlot, add_calls
from mkor.capture.passes import CaptureContext
from mkor.layers.rows import Sums


class _Tap(torch.autograd.Function):
    """Compiled capture: passes the output on and adds to preallocated tensors in the backward."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, slot: LayerSlot, context: CaptureContext, a: Sums | None
    ) -> Tensor:
        ctx.slot, ctx.context = slot, context
        ctx.save_for_backward(*(() if a is None else (a.vectors, a.norm)))
        ctx.rows = None if a is None else (a.counts, a.total)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        context, slot = ctx.context, ctx.slot
        a = Sums(*ctx.saved_tensors, *ctx.rows) if context.captures_inputs else None
        add_calls([Call(slot, (a, context.outputs(slot.kind, grad.detach(), slot.selection)))])
        return grad, None, None, None


class DetachableHook:
    """A hook that does nothing once it is copied or pickled with the model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


class ForwardHook(DetachableHook):
    """A module's forward hook.

    Args:
        context: Shared by all hooks of the optimizer.
        key: Identifies the layer in the search for output layers.
        slot: Where the sums go; None for a layer that is only watched during that search.
    """

    def __init__(self, context: CaptureContext, key: Hashable, slot: LayerSlot | None) -> None:
        self.context, self.key, self.slot = context, key, slot

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Sum the input's rows and wait for the gradient; compiled, the output passed through."""
        context = self.context
        if not context.enabled:
            return None
        compiling = torch.compiler.is_compiling()
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        output = output[0] if isinstance(output, tuple) else output
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            if not compiling:
                context.calls += torch.is_grad_enabled()
            return None
        if compiling:
            return self._compiled(module, x, output) if x.numel() else None
        context.calls += 1
        if x.numel() and not x.is_nested and x.layout is torch.strided and not is_transformed():
            self._eager(module, x, output)
        return None

    def _eager(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        context, slot = self.context, self.slot
        context.passes.see_forward()
        search = context.search
        if search is not None:
            search.forward(self.key, [x], output)
            output.register_hook(lambda _: search.backward(self.key))
        if slot is None or not _trains(module) or not slot.kind.fits(x, output):
            return
        with torch.no_grad(), span("mkor.capture"):
            a = context.inputs(slot.kind, x, slot.selection)
        _wait_for_gradient(output, GradientHook(context, slot, a))

    def _compiled(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        context, slot = self.context, self.slot
        if slot is None or not _trains(module) or not slot.kind.fits(x, output):
            return None
        a = context.inputs(slot.kind, x.detach(), slot.selection)
        tapped: Tensor = _Tap.apply(output, slot, context, a)  # type: ignore[no-untyped-call]
        return tapped


class GradientHook:
    """Captures one call when the gradient of its output arrives.

    Args:
        context: Shared by all hooks of the optimizer.
        slot: Where the sums go.
        a: Sums of the call's input; None where that side is not captured.

    Attributes:
        place: Which output of its operation is the call's.
        shape: Of the call's output, where the operation's is shaped otherwise.
    """

    __slots__ = ("a", "context", "place", "shape", "slot")

    def __init__(self, context: CaptureContext, slot: LayerSlot, a: Sums | None) -> None:
        self.context, self.slot, self.a = context, slot, a
        self.place = 0
        self.shape: torch.Size | None = None

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Sum the gradient's rows; ``grads`` are those of all outputs of the operation."""
        context, slot, grad = self.context, self.slot, grads[self.place]
        # Several passes at once are not training's.
        if grad is None or not context.enabled or is_batch_of_gradients(grad):
            return
        if self.shape is not None:
            grad = grad.reshape(self.shape)
        with torch.no_grad(), span("mkor.capture"):
            g = context.outputs(slot.kind, grad, slot.selection)
        context.passes.buffer.pending.append(Call(slot, (self.a, g)))
        context.passes.captured(slot, counts=slot.sharded)


class AccumulationHook(DetachableHook):
    """A weight's hook, run when its gradient was accumulated: a pass went through the layer."""

    def __init__(self, context: CaptureContext, key: Hashable, sharded: bool) -> None:
        self.context, self.key, self.sharded = context, key, sharded

    def __call__(self, _: Tensor) -> None:
        """Count the pass if passes count."""
        if self.context.enabled:
            self.context.passes.accumulated(self.key, self.sharded)


def _wait_for_gradient(output: Tensor, hook: GradientHook) -> None:
    """Call a hook when an output's gradient arrives.

    Hooks on nodes are cheaper than on tensors, which keep them in a dict of their own.
    """
    base = output._base
    if base is not None and base.grad_fn is not None and _is_same(base, output):
        # An activation in place cuts a view off from the graph, but not what it is a view of.
        hook.shape, output = output.shape, base
    node: Any = output.grad_fn
    if node is None:
        # Another hook made it a leaf.
        if torch.is_grad_enabled():
            output.register_hook(lambda grad: hook((grad,)))
        return
    hook.place = output.output_nr
    node.register_prehook(hook)


def _is_same(base: Tensor, view: Tensor) -> bool:
    """Whether a view is of all of its base, in the same order."""
    return base.numel() == view.numel() and base.is_contiguous() and view.is_contiguous()


def _trains(module: nn.Module) -> bool:
    # Modules look their parameters up slowly; those that compute a weight have none of that name.
    weight: object = module._parameters.get("weight")
    weight = module.weight if weight is None else weight
    return isinstance(weight, Tensor) and weight.requires_grad


def _inert(*args: Any) -> None:
    """A hook that does nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert
