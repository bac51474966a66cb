"""The table of wrappers: what goes around a base, and which options it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import mkor

from .contestants import Part, Value
from .controls import Rescaling

Keywords = dict[str, Any]
Around = Callable[..., Optimizer]

# What the bench itself passes, and what is no option at all.
RESERVED = {"base", "curvature", "hybrid", "model", "optimizer", "params", "process_group", "self"}
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def public(name: str) -> Around:
    """A public class of the library.

    Args:
        name: Its name.

    Returns:
        The class.
    """
    found: Around = getattr(mkor, name)
    return found


def defaults_of(function: Callable[..., object]) -> Keywords:
    """The options that a function takes.

    Args:
        function: A function or class.

    Returns:
        Each with its default, None where it has none.
    """
    parameters = inspect.signature(function).parameters.values()
    return {
        each.name: None if each.default is each.empty else each.default
        for each in parameters
        if each.name not in RESERVED and each.kind not in _VARIABLE
    }


def all_defaults(name: str) -> Keywords:
    """The options that an optimizer of the library takes, those that it passes on included.

    Args:
        name: Its public name.

    Returns:
        Each with its default.
    """
    kinds = {each.kind for each in inspect.signature(public(name)).parameters.values()}
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds
    inherited = defaults_of(mkor.Preconditioned) if passes_on else {}
    return inherited | defaults_of(public(name))


def plainly(name: str, model: nn.Module, base: Optimizer, keywords: Keywords) -> Optimizer:
    """The optimizer itself.

    Args:
        name: Its public name.
        model: The model.
        base: What it goes around.
        keywords: Its options.

    Returns:
        The optimizer.
    """
    return public(name)(model, base, **keywords)


def with_switch(name: str, model: nn.Module, base: Optimizer, keywords: Keywords) -> Optimizer:
    """The optimizer with a switch to its base.

    Args:
        name: Its public name.
        model: The model.
        base: What it goes around.
        keywords: Its options and the switch's.

    Returns:
        The optimizer.
    """
    known = defaults_of(public("LossRateSwitch"))
    own = {key: value for key, value in keywords.items() if key in known}
    rest = {key: value for key, value in keywords.items() if key not in known}
    switch: Any = public("LossRateSwitch")(**own)
    return public(name)(model, base, hybrid=switch, **rest)


def only_rescaled(name: str, model: nn.Module, base: Optimizer, keywords: Keywords) -> Optimizer:
    """The raw gradient with the length that window factors would give it.

    Args:
        name: The public name of the optimizer whose options and defaults are taken.
        model: The model.
        base: What it goes around.
        keywords: The options.

    Returns:
        The control.
    """
    options = all_defaults(name) | keywords
    window = {each.name: options.pop(each.name) for each in fields(mkor.Window)}
    return mkor.Preconditioned(model, base, Rescaling(mkor.Window(**window)), **options)


@dataclass(frozen=True)
class Wrapper:
    """One row of the table of wrappers.

    Attributes:
        name: The public name in `mkor` of the optimizer whose options it takes.
        defaults: Options that differ from the optimizer's own.
        make: How name, model, base and options become an optimizer.
        switch: Whether it goes over to its base, and takes the options of `LossRateSwitch` too.
        over: Options that differ over some bases.
    """

    name: str
    defaults: Mapping[str, Value] = field(default_factory=dict)
    make: Callable[[str, nn.Module, Optimizer, Keywords], Optimizer] = plainly
    switch: bool = False
    over: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)

    def defaults_over(self, base: str, options: Mapping[str, Value]) -> Keywords:
        """The options that differ from the optimizer's own, over a base.

        Args:
            base: Its name.
            options: What the user gives. `rescale` and `kl_clip` exclude each other, so one that is
                given takes the other's place; who chooses between them gets none of what differs
                over this base.

        Returns:
            Each with its value.
        """
        chosen = dict(self.defaults)
        if not options.keys() & {"rescale", "kl_clip"}:
            chosen |= self.over.get(base, {})
        for given, other in (("rescale", "kl_clip"), ("kl_clip", "rescale")):
            if options.get(given) is not None and other not in options:
                chosen[other] = None
        return chosen


# Where each baseline is at its best, as far as tried: over SGD, KFAC diverges with its `kl_clip`;
# over Adam's relatives that is better than rescaling. Eva is at its best rescaled.
_KFAC_OVER_SGD = {"kl_clip": None, "rescale": "running", "damping": 0.03, "pi_correction": True}
WRAPPERS: Mapping[str, Wrapper] = {
    "mkor": Wrapper("MKOR"),
    "mkor-h": Wrapper("MKOR", make=with_switch, switch=True),
    "dense-mkor": Wrapper("DenseMKOR"),
    "kfac": Wrapper("KFAC", over={"sgd": _KFAC_OVER_SGD}),
    "eva": Wrapper("Eva", {"kl_clip": None, "rescale": "step"}),
    "rescale": Wrapper("MKOR", make=only_rescaled),
}


def departures() -> str:
    """What the bench gives wrappers beside their own defaults, unless told otherwise.

    Returns:
        Such as "`eva`: `rescale=step`; `kfac` over `sgd`: `damping=0.03`".
    """
    texts = []
    for name, row in WRAPPERS.items():
        for place, options in (
            ("", row.defaults),
            *((f" over `{b}`", o) for b, o in row.over.items()),
        ):
            listed = ", ".join(f"`{key}={value}`" for key, value in options.items())
            texts += [f"`{name}`{place}: {listed}"] if listed else []
    return "; ".join(texts)


def wrapper_defaults(part: Part, base: str = "") -> Keywords:
    """The options that a wrapper takes.

    Args:
        part: The wrapper.
        base: What it goes around.

    Returns:
        Each with the value that it has unless told otherwise.
    """
    row = WRAPPERS[part.name]
    switch = defaults_of(public("LossRateSwitch")) if row.switch else {}
    return all_defaults(row.name) | switch | row.defaults_over(base, part.options)


def wrap(part: Part, model: nn.Module, base: Optimizer, name: str) -> Optimizer:
    """Puts a wrapper around a base.

    Args:
        part: The wrapper; its names are known to exist.
        model: The model.
        base: The base.
        name: The base's name.

    Returns:
        The optimizer.
    """
    row = WRAPPERS[part.name]
    defaults = row.defaults_over(name, part.options)
    return row.make(row.name, model, base, {**defaults, **part.options, **_dtypes(part.options)})


def has_switch(part: Part | None) -> bool:
    """Whether a wrapper goes over to its base and therefore must be told the loss.

    Args:
        part: The wrapper, or None.

    Returns:
        True if it does.
    """
    return part is not None and WRAPPERS[part.name].switch


def _dtypes(options: Mapping[str, Value]) -> Keywords:
    """Dtypes that are named by words."""
    found = {key: getattr(torch, str(value), None) for key, value in options.items()}
    return {key: dtype for key, dtype in found.items() if isinstance(dtype, torch.dtype)}
