"""Contestants: how they are written, which there are, and how their optimizers are made.

A contestant is a base, `adamw[weight_decay=0.1]`, or a wrapper over one,
`mkor[sides=left,rescale=none]+muon`. `BASES` and `WRAPPERS` are the tables of both, `RATES` the
learning rates where tuning begins.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import mkor

from .cli import MissingExtraError, UnknownNameError, UsageError

Options = Mapping[str, Any]
WORDS: Options = {"none": None, "true": True, "false": False}
# The option that a bare word in a name's brackets stands for.
BARE: Mapping[str, str] = {"dense-mkor": "rule"}
# Parameters that the bench itself passes, and those that are no options at all.
RESERVED = {"base", "curvature", "hybrid", "model", "optimizer", "params", "process_group", "self"}


@dataclass(frozen=True)
class Part:
    """One name with the options in its brackets."""

    name: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A base, or a wrapper over one; the label is the text as written, without blanks."""

    label: str
    base: Part
    wrapper: Part | None = None


# Reading


def split_outside(text: str, separator: str) -> list[str]:
    """Splits at a separator of one character, but not within brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if depth < 0:
            break
        if character == separator and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:
        raise UsageError(
            f"the brackets of {text!r} do not match; write it like mkor[rank=32]+adamw."
        )
    return pieces


def parse_value(text: str) -> Any:
    """Reads a number, a tuple, none, true or false; any other word stands for itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_part(text: str) -> Part:
    """Reads a name with or without options, such as `mkor[rank=32]`."""
    name, bracket, rest = text.partition("[")
    if not name or (bracket and not rest.endswith("]")):
        raise UsageError(f"cannot read {text!r}; write a name, or name[option=value,...].")
    options: dict[str, Any] = {}
    for item in split_outside(rest[:-1], ",") if rest[:-1] else []:
        if item.isidentifier() and name.lower() in BARE:
            item = f"{BARE[name.lower()]}={item}"
        key, equals, value = item.partition("=")
        if not (key.isidentifier() and equals and value):
            raise UsageError(f"cannot read the option {item!r} of {name!r}; write option=value.")
        if key in options:
            raise UsageError(f"the option {key!r} of {name!r} is given twice.")
        options[key] = parse_value(value)
    return Part(name.lower(), options)


def parse_contestant(text: str) -> Contestant:
    """Reads a base, or a wrapper, a plus and a base; whether the names exist is not checked."""
    label = "".join(text.split())
    parts = [parse_part(piece) for piece in split_outside(label, "+")]
    if len(parts) > 2:
        raise UsageError(
            f"{label!r} has {len(parts)} parts; write a base, or one wrapper over a base, "
            "such as mkor+adamw."
        )
    return Contestant(label, parts[-1], parts[0] if len(parts) == 2 else None)


def parse_contestants(text: str) -> list[Contestant]:
    """Reads contestants separated by commas; refuses one that appears twice."""
    contestants = [parse_contestant(piece) for piece in split_outside(text, ",")]
    labels = [contestant.label for contestant in contestants]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"the contestant {label!r} appears twice.")
    return contestants


def checked_contestants(text: str) -> tuple[Contestant, ...]:
    """Reads contestants and makes sure that their names and options exist."""
    contestants = tuple(parse_contestants(text))
    for contestant in contestants:
        check_names(contestant)
    return contestants


# Bases


def over_all(kind: Callable[..., Optimizer], model: nn.Module, options: Options) -> Optimizer:
    """Makes one optimizer for all parameters."""
    return kind(model.parameters(), **options)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that Muon is for: weights of linear layers but the last, each once."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(linear.weight for linear in linears[:-1]))


def over_hidden(kind: Callable[..., Optimizer], model: nn.Module, options: Options) -> Optimizer:
    """Makes Muon for the hidden matrices and AdamW, at `rest` times its rate, for all else."""
    hidden = hidden_matrices(model)
    if not hidden:
        raise UsageError(
            "muon is for the matrices of hidden linear layers, of which this model has none; "
            "leave it out."
        )
    muon = {key: value for key, value in options.items() if key != "rest"}
    chosen = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    adamw = AdamW(rest, lr=muon["lr"] * options["rest"], weight_decay=muon["weight_decay"])
    return mkor.Combined(kind(hidden, **muon), adamw)


@dataclass(frozen=True)
class Base:
    """One row of the table of bases."""

    source: str  # module and class, imported when asked for
    rate: float  # at the centre of the grid, where `RATES` has none
    weight_decay: float
    defaults: Options = field(default_factory=dict)  # options that differ from the class's own
    # How class, model and options become an optimizer.
    make: Callable[[Callable[..., Optimizer], nn.Module, Options], Optimizer] = over_all


# LAMB is as its paper and the BERT recipe have it: decay inside the trust ratio, no correction of
# the rate, gradients clipped to a global norm of 1. The package's own defaults differ.
_LAMB = {"weight_decouple": False, "adam_debias": True, "pre_norm": True}
_MUON = {"adjust_lr_fn": "match_rms_adamw", "rest": 1.0}
BASES: Mapping[str, Base] = {
    "sgd": Base("torch.optim:SGD", 0.1, 5e-4, {"momentum": 0.9}),
    "adamw": Base("torch.optim:AdamW", 3e-3, 0.01),
    "lamb": Base("pytorch_optimizer:Lamb", 0.02, 0.01, _LAMB),
    "soap": Base("pytorch_optimizer:SOAP", 6e-3, 0.01),
    "muon": Base("torch.optim:Muon", 0.012, 0.01, _MUON, over_hidden),
}


def load_class(name: str) -> type[Optimizer]:
    """Imports the class of a base."""
    module, _, attribute = BASES[name].source.partition(":")
    try:
        found: type[Optimizer] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingExtraError(module.replace("_", "-"), f"the contestant {name!r}") from error
    except AttributeError as error:
        raise UsageError(f"the contestant {name!r} needs a newer torch: {error}.") from error
    return found


# Wrappers


@dataclass(frozen=True)
class Rescaling(mkor.Window):
    """A window that lends a gradient its length but not its direction; all else is the window's."""

    def apply(self, prepared: dict[str, Tensor], M: Tensor, ok: Tensor) -> Tensor:
        """Scales `M [B, d_out, d_in (+1)]` in place where `ok [B]`."""
        P = M.clone()
        ok = super().apply(prepared, P, ok)
        ratio = torch.linalg.matrix_norm(P) / torch.linalg.matrix_norm(M)
        M.mul_(torch.where(ok & ratio.isfinite(), ratio, 1.0)[:, None, None])
        return ok


@dataclass(frozen=True)
class Wrapper:
    """One row of the table of wrappers."""

    name: str  # the public name in `mkor` of the optimizer whose options it takes
    defaults: Options = field(default_factory=dict)  # options that differ from the optimizer's own
    # Whether it goes over to its base, and takes the options of `LossRateSwitch` too.
    switch: bool = False
    control: bool = False  # whether it is `Rescaling` by the optimizer's windows instead
    over: Mapping[str, Options] = field(default_factory=dict)  # options that differ over some bases

    def defaults_over(self, base: str, options: Options) -> dict[str, Any]:
        """The options that differ from the optimizer's own over a base, given the user's."""
        chosen = dict(self.defaults)
        # The two exclude each other, so one that is given takes the other's place; a user who
        # chooses between them gets none of what differs over this base.
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
    "mkor-h": Wrapper("MKOR", switch=True),
    "dense-mkor": Wrapper("DenseMKOR"),
    "kfac": Wrapper("KFAC", over={"sgd": _KFAC_OVER_SGD}),
    "eva": Wrapper("Eva", {"kl_clip": None, "rescale": "step"}),
    "rescale": Wrapper("MKOR", control=True),
}


def departures() -> str:
    """What wrappers get beside their own defaults, such as "`eva`: `rescale=step`; ..."."""
    rows = [(f"`{name}`", row.defaults) for name, row in WRAPPERS.items()]
    rows += [
        (f"`{name}` over `{base}`", options)
        for name, row in WRAPPERS.items()
        for base, options in row.over.items()
    ]
    return "; ".join(
        f"{place}: {', '.join(f'`{key}={value}`' for key, value in options.items())}"
        for place, options in rows
        if options
    )


def has_switch(part: Part | None) -> bool:
    """Whether a wrapper goes over to its base and therefore must be told the loss."""
    return part is not None and WRAPPERS[part.name].switch


def report_loss(contestant: Contestant, optimizer: Optimizer, loss: Tensor) -> None:
    """Tells an optimizer the loss of the step about to be taken, if its switch depends on it."""
    if has_switch(contestant.wrapper):
        optimizer.report_loss(loss.detach())  # type: ignore[attr-defined]


# Options


def defaults_of(function: Callable[..., object]) -> dict[str, Any]:
    """The options that a function or class takes, each with its default or None."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        each.name: None if each.default is each.empty else each.default
        for each in inspect.signature(function).parameters.values()
        if each.name not in RESERVED and each.kind not in variable
    }


def class_defaults(name: str) -> dict[str, Any]:
    """The options of an optimizer of the library, those that it passes on included."""
    kinds = {each.kind for each in inspect.signature(getattr(mkor, name)).parameters.values()}
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds
    inherited = defaults_of(mkor.Preconditioned) if passes_on else {}
    return inherited | defaults_of(getattr(mkor, name))


def base_defaults(part: Part) -> dict[str, Any]:
    """The options that a base takes, with the values that they have unless told otherwise."""
    return defaults_of(load_class(part.name)) | dict(BASES[part.name].defaults)


def wrapper_defaults(part: Part, base: str = "") -> dict[str, Any]:
    """The options that a wrapper takes over a base, with their values unless told otherwise."""
    row = WRAPPERS[part.name]
    switch = defaults_of(mkor.LossRateSwitch) if row.switch else {}
    return class_defaults(row.name) | switch | row.defaults_over(base, part.options)


def options_of(contestant: Contestant) -> dict[str, dict[str, Any]]:
    """Every option of a contestant's base and wrapper, those left as they are included."""
    base, wrapper = contestant.base, contestant.wrapper
    options = {"base": base_defaults(base) | dict(base.options)}
    if wrapper:
        options["wrapper"] = wrapper_defaults(wrapper, base.name) | dict(wrapper.options)
    return options


def check_names(contestant: Contestant) -> None:
    """Makes sure that a contestant's names and options exist."""
    base, wrapper = contestant.base, contestant.wrapper
    if wrapper and wrapper.name not in WRAPPERS:
        raise UnknownNameError("wrapper", wrapper.name, WRAPPERS)
    if base.name in WRAPPERS:
        raise UsageError(
            f"{base.name!r} goes around a base: write {base.name}+adamw, "
            f"or another base of {', '.join(BASES)}."
        )
    if base.name not in BASES:
        everything = [*BASES, *(f"{name}+adamw" for name in WRAPPERS)]
        raise UnknownNameError("contestant", base.name, BASES if wrapper else everything)
    for part, known in ((base, base_defaults), (wrapper, wrapper_defaults)):
        for key in part.options if part else ():
            if part and key not in (choices := known(part)):
                raise UnknownNameError(f"option of {part.name}", key, sorted(choices))


# Making


def wrap(row: Wrapper, model: nn.Module, base: Optimizer, options: dict[str, Any]) -> Optimizer:
    """Puts a wrapper around the optimizer of a base."""
    if row.switch:
        known = defaults_of(mkor.LossRateSwitch).keys() & options.keys()
        options["hybrid"] = mkor.LossRateSwitch(**{key: options.pop(key) for key in known})
    if row.control:
        options = class_defaults(row.name) | options
        window = Rescaling(**{each.name: options.pop(each.name) for each in fields(mkor.Window)})
        return mkor.Preconditioned(model, base, window, **options)
    made: Optimizer = getattr(mkor, row.name)(model, base, **options)
    return made


def build(contestant: Contestant, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """Makes the optimizer of a contestant whose names are known to exist."""
    part, row, wrapper = contestant.base, BASES[contestant.base.name], contestant.wrapper
    options = {**row.defaults, "weight_decay": weight_decay, **part.options, "lr": lr}
    base = row.make(load_class(part.name), model, options)
    if wrapper is None:
        return base
    row_around, given = WRAPPERS[wrapper.name], dict(wrapper.options)
    for key, value in given.items():
        dtype = getattr(torch, str(value), None)
        given[key] = dtype if isinstance(dtype, torch.dtype) else value
    return wrap(row_around, model, base, row_around.defaults_over(part.name, given) | given)


def check(contestant: Contestant, model: nn.Module) -> None:
    """Makes sure, before anything runs, that a contestant can be made; the model is spoilt."""
    check_names(contestant)
    try:
        build(contestant, model, centre(contestant, ""), 0.0)
    except UsageError:
        raise
    except Exception as error:
        # The optimizers' packages each raise their own kinds for bad options.
        raise UsageError(
            f"{contestant.label} cannot be made: {type(error).__name__}: {error}"
        ) from error


def check_all(contestants: Iterable[Contestant], make: Callable[[], nn.Module]) -> None:
    """Makes sure that contestants can be made, each for a model of its own."""
    for contestant in contestants:
        check(contestant, make())


# Learning rates

# The best of grids a factor of two apart, at the sizes and lengths that the tasks have unless told
# otherwise. A row is looked for under the contestant as it is written, options included, then
# under the bare names `wrapper+base`, then under the base alone.
RATES: Mapping[str, Mapping[str, float]] = {
    "text-lm": {
        "lamb": 0.01,
        "mkor+adamw": 6e-3,
        "mkor+lamb": 0.02,
        "kfac+adamw": 6e-3,
        "kfac+lamb": 0.02,
    },
    "text-lm-torch-init": {"sgd": 0.4, "adamw": 6e-3, "soap": 0.024, "muon": 0.024},
    "digits-mlp": {"sgd": 0.2, "adamw": 0.012, "soap": 0.012},
    "digits-conv": {"adamw": 6e-3, "mkor+sgd": 0.05, "mkor+adamw": 3e-3, "kfac+adamw": 0.012},
    "digits-large": {"adamw": 0.012, "mkor+adamw": 6e-3},
    "digits-autoencoder": {"sgd": 0.05, "adamw": 0.02, "soap": 0.024, "muon": 0.024},
}
# A wrapper that begins where another does, unless it has a row of its own.
LIKE: Mapping[str, str] = {"mkor-h": "mkor"}


def centre(contestant: Contestant, task: str) -> float:
    """The learning rate at the centre of a contestant's grid: the base's `lr`, or the table's."""
    base, wrapper = contestant.base, contestant.wrapper
    given = base.options.get("lr")
    if isinstance(given, int | float):
        return float(given)
    bare = [wrapper.name, LIKE.get(wrapper.name, wrapper.name)] if wrapper else []
    rows = RATES.get(task, {})
    keys = (contestant.label, *(f"{name}+{base.name}" for name in bare), base.name)
    return next((rows[key] for key in keys if key in rows), BASES[base.name].rate)


def grid(middle: float, trials: int) -> list[float]:
    """Learning rates `[c, 2 c, c / 2, 4 c, ...]` around a middle, rounded to three digits."""
    exponents = [(index + 1) // 2 * (1 if index % 2 else -1) for index in range(trials)]
    return [float(f"{middle * 2.0**exponent:.3g}") for exponent in exponents]
