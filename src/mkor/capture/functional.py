"""Products that no module is called for, found in the autograd graph of a module's output.

``nn.MultiheadAttention`` multiplies with its projections in one function, so hooks on them never
run. The nodes of these products hold their input, and see the gradient of their output.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mkor._torch import is_transformed, saved_tensors_are_hooked, span
from mkor.capture.buffer import LayerSlot
from mkor.capture.hooks import DetachableHook, GradientHook
from mkor.capture.passes import CaptureContext
from mkor.layers.layer import Layer

# The product's node, and where it keeps its input.
_PRODUCTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
# What may stand between a product and the weight it multiplies with: transposition and autocast.
_PASSING = {"TBackward0", "TransposeBackward0", "ToCopyBackward0"}


class FunctionalLinearHook(DetachableHook):
    """A forward hook of the module around a product.

    Compiled code has no such graph, and under saved-tensor hooks (checkpointing without reentry,
    offloading) a node's input must not be read twice: then nothing is captured, and the raw
    gradient passes.

    Args:
        context: Shared by all hooks of the optimizer.
        layer: The product.
        slot: Where its sums go; None for a layer that is only watched during the search.
        last: Whether it is the module's last product, and stands for it in the search.
    """

    def __init__(
        self, context: CaptureContext, layer: Layer, slot: LayerSlot | None, last: bool
    ) -> None:
        self.context, self.slot, self.last = context, slot, last
        self.key: Hashable = layer.name
        self.path = (layer.spec.owner, layer.spec.weight)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Find the product and wait for its gradient."""
        context = self.context
        if not context.enabled or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        context.calls += 1
        output = output[0] if isinstance(output, tuple) else output
        if not (isinstance(output, Tensor) and output.requires_grad) or is_transformed():
            return
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        search = context.search
        if search is not None and self.last:
            search.forward(self.key, inputs, output)
            output.register_hook(lambda _: search.backward(self.key))
        if self.slot is not None and not saved_tensors_are_hooked():
            self._capture(module, self.slot, inputs, output)

    def _capture(
        self, module: nn.Module, slot: LayerSlot, inputs: list[Tensor], output: Tensor
    ) -> None:
        owner, name = self.path
        node = _product(output, getattr(module.get_submodule(owner), name), inputs)
        x = None if node is None else getattr(node, _PRODUCTS[node.name()])
        if node is None or x is None:
            return
        with torch.no_grad(), span("mkor.capture"):
            a = self.context.inputs(slot.kind, x, slot.selection)
        node.register_prehook(GradientHook(self.context, slot, a))


def _product(output: Tensor, weight: Tensor, inputs: list[Tensor]) -> Any:
    """The node of the product with ``weight`` between a module's inputs and its output."""
    seen = {x.grad_fn for x in inputs}
    pending = [output.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _PRODUCTS and any(leaf is weight for leaf in _factors(node)):
            return node
        pending.extend(parent for parent, _ in node.next_functions)
    return None


def _factors(node: Any) -> Iterator[Tensor]:
    """The parameters that a node multiplies or adds directly."""
    for parent, _ in node.next_functions:
        while parent is not None and parent.name() in _PASSING:
            parent = parent.next_functions[0][0]
        if hasattr(parent, "variable"):
            yield parent.variable
