"""Hooks: from a running model to sums of a few vectors per layer.

A forward hook notes a layer's input; when the gradient of that call's output arrives, the chosen
rows of both are summed, and added to the layer's slots when the pass ends. Adding in the backward
pass only means that evaluation, recomputation under checkpointing and Lightning's late
``zero_grad`` all count rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from mkor import graphs
from mkor.capture.gate import Gate
from mkor.capture.passes import graph_is_kept
from mkor.capture.site import Site
from mkor.capture.tray import Call
from mkor.layers.sums import PartSums
from mkor.profiling import span

__all__ = ["AccumulationHook", "ForwardHook", "GradientHook", "InertHook", "is_transformed"]


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
        if not gate.open:
            return None
        compiling = torch.compiler.is_compiling()
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        output = output[0] if isinstance(output, tuple) else output
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
            if not compiling:
                gate.calls += torch.is_grad_enabled()
            return None
        if compiling:
            return self._compiled(module, x, output) if x.numel() else None
        gate.calls += 1
        if x.numel() and not x.is_nested and x.layout is torch.strided and not is_transformed():
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
        # Detached: somebody may put other data into the tensor until the backward pass.
        a: PartSums | Tensor | None = x.detach()
        # What autograd keeps anyway is read with the gradient, the same work twice in a row.
        if not _is_saved(module, x):
            if not site.kind.fits(x, output):
                return
            with span("mkor.capture"):
                a = gate.inputs(site.kind, x.detach(), gate.choose(site, x))
        _wait_for_gradient(output, GradientHook(gate, site, a))

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
        place: Which output of its operation is the call's.

    Attributes:
        shape: Of the call's output, where the operation's is shaped otherwise.
    """

    __slots__ = ("a", "gate", "place", "shape", "site")

    def __init__(self, gate: Gate, site: Site, a: PartSums | Tensor | None, place: int = 0) -> None:
        self.gate, self.site, self.a, self.place = gate, site, a, place
        self.shape: torch.Size | None = None

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Add both sides.

        Args:
            grads: Of all outputs of the operation that made the call's output.
        """
        gate, site, grad = self.gate, self.site, grads[self.place]
        if grad is None or not gate.open:
            if not graph_is_kept():
                self.a = None
            return
        if self.shape is not None:
            grad = grad.reshape(self.shape)
        # Asked here, since a call costs more than what it asks: this runs between large products.
        if profiler._is_profiler_enabled:
            with span("mkor.capture"):
                self._take(grad)
        else:
            self._take(grad)
        if site.sharded:
            gate.passes.count(site)

    def _take(self, grad: Tensor) -> None:
        gate, site = self.gate, self.site
        # Several passes at once (`is_grads_batched`) are not training's.
        if type(grad) is Tensor and not torch._C._has_storage(grad):
            return
        if not (site.add_call(self, grad, gate.now) or gate.hold(site, self, grad)):
            self._capture(grad.detach())

    def _capture(self, grad: Tensor) -> None:
        gate, site, a = self.gate, self.site, self.a
        pick = gate.choose(site, grad)
        if isinstance(a, Tensor):
            if not site.kind.fits(a, grad):
                return
            # The graph may live on, and be used again; its inputs need not.
            a = self.a = gate.inputs(site.kind, a, pick)
        g = gate.outputs(site.kind, grad, pick)
        # A captured CUDA graph repeats what ran on the device, and no callbacks.
        if graphs.is_capturing(grad):
            site.add(a, g)
        else:
            gate.keep(site.tray, Call(site.index, (a, g), site.kind, self))


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


def is_transformed() -> bool:
    """Whether code runs under a transformation of ``torch.func``, on tensors that hide others.

    Returns:
        Whether it does.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


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


_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _is_saved(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd keeps a layer's input as it is until the backward pass anyway."""
    # A subclass may transform it first; the input is then nobody's, and may change.
    if type(module).forward not in _PLAIN or "forward" in module.__dict__:
        return False
    if torch._C._is_any_autocast_enabled():
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
