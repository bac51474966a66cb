"""A layer as a matrix: ``y = W x (+ b)``, whose gradient is ``M = [W b] [d_out, d_in (+1)]``.

Rows are samples: ``a [n, d_in]`` are the layer's inputs and ``g [n, d_out]`` the gradients of the
loss with respect to its outputs, so that ``g^T a`` summed over rows is the weight's gradient. Where
there is a bias, ``a`` has a last column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mkor.layers.rows import RowSelection, Sums

SIDES = ("left", "right")
"""Of the output gradients, and of the inputs."""


class LayerKind(Protocol):
    """How a kind of layer reads as ``y = W x (+ b)``."""

    @property
    def d_in(self) -> int:
        """Columns of ``W``."""

    @property
    def d_out(self) -> int:
        """Rows of ``W``."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether input and output are what this layer takes and makes, sample by sample."""

    def input_sums(self, x: Tensor, selection: RowSelection) -> Sums:
        """Sums of ``a`` over the selected rows of the layer's input."""

    def output_sums(self, g: Tensor, selection: RowSelection) -> Sums:
        """Sums of raw ``g`` over the same rows, from the gradient of the layer's output."""

    def input_moments(self, x: Tensor) -> Sums:
        """Sums of all rows of ``a``, and of their outer products."""

    def output_moments(self, g: Tensor) -> Sums:
        """Sums of all rows of raw ``g``, and of their outer products."""


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix of a module.

    Attributes:
        kind: How it reads as ``y = W x (+ b)``.
        name: What is added to the module's name.
        owner: The submodule that holds the parameters; empty for the module itself.
        weight: Name of the weight in its owner.
        bias: Name of the bias in its owner; empty if it has none of its own.
        transposed: Whether the weight is stored as ``[d_in, d_out]``.
        functional: Whether the product is computed without calling a module for it, so that no hook
            sees its input; it is then found in the autograd graph of the module's output.
    """

    kind: LayerKind
    name: str = ""
    owner: str = ""
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    functional: bool = False


@dataclass(frozen=True)
class GroupShape:
    """``layers`` layers of one shape.

    Attributes:
        layers: ``B``.
        d_out: Rows of ``M``: the width of the left side.
        d_in: Columns of ``W``.
        bias: Whether the right side has a column of ones.
        sides: The sides in use.
        dtype: Of the arithmetic: float32 or float64.
        device: Where the weights are.
    """

    layers: int
    d_out: int
    d_in: int
    bias: bool
    sides: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def columns(self) -> int:
        """Columns of ``M``."""
        return self.d_in + self.bias

    def width(self, side: str) -> int:
        """Width of a side's vectors, without the column of ones."""
        return self.d_out if side == "left" else self.d_in

    def full_width(self, side: str) -> int:
        """Width of a side's factor, with the column of ones of a bias."""
        return self.d_out if side == "left" else self.columns


@dataclass(frozen=True)
class Block:
    """Which part of a layer is stored here, where several processes each store one; maybe none.

    Attributes:
        rows: Rows of ``W``.
        columns: Columns of ``W``.
        bias: Entries of ``b``, the same as ``rows`` where rows are cut; empty without a bias.
        cut: ``"rows"`` or ``"columns"``, the same for all parts: one part may be everything.
    """

    rows: slice
    columns: slice
    bias: slice
    cut: str

    def __hash__(self) -> int:
        # Slices have none before Python 3.12.
        places = (self.rows, self.columns, self.bias)
        return hash((*((s.start, s.stop) for s in places), self.cut))


def local(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that is stored here; writing into it changes it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(eq=False)
class Layer:
    """A weight and the modules that compute with it.

    Attributes:
        name: Of its first module, without the prefixes of wrappers.
        spec: Which matrix of its modules it is.
        modules: What is hooked; more than one where a weight is shared.
        has_bias: Whether there is a bias that the base optimizer trains with the weight.
        reason: Why it is left to the base optimizer; empty if it is preconditioned.
    """

    name: str
    spec: MatrixSpec
    modules: list[nn.Module]
    has_bias: bool = False
    reason: str = ""

    @property
    def kind(self) -> LayerKind:
        """How it reads as ``y = W x (+ b)``."""
        return self.spec.kind

    @cached_property
    def owner(self) -> nn.Module:
        """The module that holds the parameters."""
        return self.modules[0].get_submodule(self.spec.owner)

    @property
    def weight(self) -> Tensor:
        """The current parameter: sharding and casting may replace it after construction."""
        weight = _parameter(self.owner, self.spec.weight)
        if not isinstance(weight, Tensor):
            raise RuntimeError(
                f"the optimizer watches {self.name}, whose {type(self.owner).__name__} has no "
                f"tensor {self.spec.weight!r} any more: close() the optimizer and "
                "wrap its base again once the model has its final layers"
            )
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The current bias parameter, if it is trained with the weight."""
        bias = _parameter(self.owner, self.spec.bias) if self.has_bias else None
        return bias if isinstance(bias, Tensor) else None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of weight, as it multiplies, and bias: the parts that are stored here; None without."""
        weight, bias = self.weight, self.bias
        if weight.grad is None or not weight.requires_grad:
            return None, None
        W = local(weight.grad)
        b = None if bias is None or bias.grad is None else local(bias.grad)
        return (W.mT if self.spec.transposed else W), b


def _parameter(owner: nn.Module, name: str) -> object:
    """What an attribute gives, faster for parameters that the module itself holds."""
    found = owner._parameters.get(name)
    return getattr(owner, name, None) if found is None else found
