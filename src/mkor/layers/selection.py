"""Which layers of a model are preconditioned, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mkor.layers.describe import describe
from mkor.layers.layer import Layer, MatrixSpec

WIDEST_OUTPUT = 30_000
"""Linear layers with more outputs than this are vocabularies, and left to the base optimizer."""

Skip = Sequence["nn.Module | type[nn.Module] | str"]


@dataclass
class Selection:
    """The outcome of looking through a model.

    Attributes:
        layers: Every layer of a supported kind, preconditioned or not.
        reasons: For other parameters, by their identity, why they are left to the base optimizer.
        others: Layers, by name, that cannot be preconditioned but may stand next to the loss.
    """

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    others: dict[str, nn.Module] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        """What must be the same on all processes: each layer's form, and how it is treated."""
        return {
            f"layer {layer.name}": f"[{layer.kind.d_out}, {layer.kind.d_in}]"
            + (" with bias" if layer.has_bias else "")
            + f" in {layer.weight.dtype}"
            + (f" ({layer.reason})" if layer.reason else "")
            for layer in self.layers
        }


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """What turns names as in ``named_modules`` into names in the user's own model.

    It drops what DDP and ``torch.compile`` put before them.
    """
    wrapped = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.parallel.DistributedDataParallel) or "_orig_mod" in module._modules
    }
    # Around the whole model, anything that holds nothing but a module is a wrapper too.
    name, module = "", model
    while list(module._modules) in (["module"], ["_orig_mod"]) and not module._parameters:
        wrapped.add(name)
        (child,) = module._modules
        name, module = f"{name}.{child}".lstrip("."), module.get_submodule(child)

    def clean(name: str) -> str:
        parts = name.split(".")
        added = [
            part in ("module", "_orig_mod") and ".".join(parts[:i]) in wrapped
            for i, part in enumerate(parts)
        ]
        return ".".join(part for part, drop in zip(parts, added, strict=True) if not drop)

    return clean


def select(model: nn.Module, optimized: Iterable[Tensor], skip: Skip) -> Selection:
    """Look through a model's modules in order, for layers over ``optimized`` parameters.

    What lies inside a skipped module is skipped with it.
    """
    known = {id(p) for p in optimized}
    skipped = _skipped(model, skip)
    owners = _owners(model)
    clean = cleaner(model)
    selection = Selection()
    by_weight: dict[int, Layer] = {}
    inside: set[nn.Module] = set()
    for full_name, module in model.named_modules():
        name, specs = clean(full_name), describe(module)
        if specs is None or module in inside:
            continue
        reason = specs if isinstance(specs, str) else _unusable(module, specs)
        if isinstance(specs, str) or reason:
            selection.others[name] = module
            for parameter in module.parameters():
                selection.reasons[id(parameter)] = reason
            continue
        for parameter in module.parameters(recurse=False):
            if not _is_held(parameter, module, specs):
                selection.reasons[id(parameter)] = "part of several matrices, or of none"
        for spec in specs:
            layer = Layer(".".join(filter(None, (name, spec.name))), spec, [module])
            if spec.owner:
                inside.add(layer.owner)
            if id(layer.weight) in selection.reasons or _joins(layer, by_weight, selection):
                continue
            _settle_bias(layer, known, owners, selection)
            layer.reason = (
                skipped.get(id(layer.owner))
                or _tied_reason(layer.weight, owners)
                or _parameter_reason(layer.weight, known)
                or _width_reason(spec)
            )
            by_weight[id(layer.weight)] = layer
            selection.layers.append(layer)
    return selection


def _is_held(parameter: Tensor, module: nn.Module, specs: Iterable[MatrixSpec]) -> bool:
    names = [name for spec in specs if not spec.owner for name in (spec.weight, spec.bias)]
    return any(module._parameters.get(name) is parameter for name in names)


def _joins(layer: Layer, by_weight: dict[int, Layer], selection: Selection) -> bool:
    """Whether another layer already has the weight; the module then counts as one of its uses."""
    shared = by_weight.get(id(layer.weight))
    if shared is None:
        return False
    shared.modules += layer.modules
    bias = _bias_of(layer)
    if shared.spec != layer.spec or _bias_of(shared) is not bias:
        shared.reason = f"shares its weight with {layer.name}, but not its form or bias"
        selection.reasons[id(bias)] = shared.reason
    return True


def _settle_bias(
    layer: Layer, known: set[int], owners: dict[int, list[nn.Module]], selection: Selection
) -> None:
    bias = _bias_of(layer)
    if bias is None:
        return
    alone = len(owners[id(bias)]) == len(owners[id(layer.weight)])
    layer.has_bias = id(bias) in known and bias.requires_grad and alone
    if not alone:
        selection.reasons[id(bias)] = "shared by layers with different weights"


def _bias_of(layer: Layer) -> Tensor | None:
    bias = getattr(layer.owner, layer.spec.bias, None) if layer.spec.bias else None
    return bias if isinstance(bias, Tensor) else None


def _width_reason(spec: MatrixSpec) -> str:
    return "" if spec.kind.d_out <= WIDEST_OUTPUT else f"wider than {WIDEST_OUTPUT:,} outputs"


def _skipped(model: nn.Module, skip: Skip) -> dict[int, str]:
    if isinstance(skip, str | nn.Module | type):
        raise TypeError(f"skip must be a list or tuple, got {skip!r}: write skip=[...]")
    clean = cleaner(model)
    named = [(clean(name), module) for name, module in model.named_modules()]
    reasons: dict[int, str] = {}
    for entry in skip:
        matches = [module for name, module in named if _matches(entry, name, module)]
        if not matches:
            names = ", ".join(name for name, module in named if describe(module))
            raise ValueError(f"skip={entry!r} matches no module of the model; layers are: {names}")
        shown = entry if isinstance(entry, str) else getattr(entry, "__name__", "the module")
        for module in matches:
            for inside in module.modules():
                reasons.setdefault(id(inside), f"skipped by the user ({shown})")
    return reasons


def _matches(entry: object, name: str, module: nn.Module) -> bool:
    if isinstance(entry, str):
        return fnmatchcase(name, entry)
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return isinstance(module, entry)
    if isinstance(entry, nn.Module):
        return module is entry
    raise TypeError(f"skip takes modules, module types and patterns on names, got {entry!r}")


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _unusable(module: nn.Module, specs: Iterable[MatrixSpec]) -> str:
    for spec in specs:
        owner = module.get_submodule(spec.owner)
        if parametrize.is_parametrized(owner):
            return "parametrized: its weight is computed, not trained itself"
        weight = owner._parameters.get(spec.weight)
        if weight is None:
            return "its weight is computed, not a parameter itself"
        if not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
    return ""


def _tied_reason(weight: Tensor, owners: dict[int, list[nn.Module]]) -> str:
    for owner in owners[id(weight)]:
        if describe(owner) is None:
            return f"tied to the weight of {type(owner).__name__}"
    return ""


def _parameter_reason(weight: Tensor, known: set[int]) -> str:
    if id(weight) not in known:
        return "not among the base optimizer's parameters"
    if not weight.requires_grad:
        return "frozen when it was wrapped (requires_grad=False)"
    if weight.device == torch.device("meta"):
        return "on the meta device"
    return ""
