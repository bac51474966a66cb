"""The table of bases: how each optimizer is made, alone or wrapped, and where its search begins."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import mkor

from .contestants import Contestant, Part, Value
from .errors import MissingExtraError, UnknownNameError, UsageError
from .rates import known_rate
from .wrappers import WRAPPERS, Keywords, defaults_of, wrap, wrapper_defaults

Maker = Callable[[Callable[..., Optimizer], nn.Module, Keywords], Optimizer]


def over_all(kind: Callable[..., Optimizer], model: nn.Module, keywords: Keywords) -> Optimizer:
    """One optimizer for all parameters.

    Args:
        kind: The optimizer's class.
        model: The model.
        keywords: What the class is called with.

    Returns:
        The optimizer.
    """
    return kind(model.parameters(), **keywords)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that Muon is for: those of linear layers, but not of the last one.

    Args:
        model: The model.

    Returns:
        Their weights, each once.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(linear.weight for linear in linears[:-1]))


def over_hidden(kind: Callable[..., Optimizer], model: nn.Module, keywords: Keywords) -> Optimizer:
    """Muon for the hidden matrices, AdamW for the rest.

    Args:
        kind: Muon's class.
        model: The model.
        keywords: What Muon is called with; `rest` is AdamW's learning rate over Muon's.

    Returns:
        Both as one optimizer.

    Raises:
        UsageError: If no matrix is hidden, since torch's Muon takes nothing else.
    """
    rest_rate = keywords["lr"] * keywords.pop("rest")
    hidden = hidden_matrices(model)
    if not hidden:
        raise UsageError(
            "muon is for the matrices of hidden linear layers, of which this model has none; "
            "leave it out."
        )
    chosen = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    adamw = AdamW(rest, lr=rest_rate, weight_decay=keywords["weight_decay"])
    return mkor.Combined(kind(hidden, **keywords), adamw)


@dataclass(frozen=True)
class Base:
    """One row of the table of bases.

    Attributes:
        source: Module and class, imported when asked for.
        rate: The learning rate at the centre of the grid, where `rates.RATES` has none.
        weight_decay: The weight decay unless told otherwise.
        defaults: Options that differ from the class's own.
        make: How class, model and options become an optimizer.
    """

    source: str
    rate: float
    weight_decay: float
    defaults: Mapping[str, Value] = field(default_factory=dict)
    make: Maker = over_all


BASES: Mapping[str, Base] = {
    "sgd": Base("torch.optim:SGD", 0.1, 5e-4, {"momentum": 0.9}),
    "adamw": Base("torch.optim:AdamW", 3e-3, 0.01),
    # As its paper and the BERT recipe have it: decay inside the trust ratio, no correction of the
    # rate, gradients clipped to a global norm of 1. The package's own defaults differ.
    "lamb": Base(
        "pytorch_optimizer:Lamb",
        0.02,
        0.01,
        {"weight_decouple": False, "adam_debias": True, "pre_norm": True},
    ),
    "soap": Base("pytorch_optimizer:SOAP", 6e-3, 0.01),
    "muon": Base(
        "torch.optim:Muon",
        0.012,
        0.01,
        {"adjust_lr_fn": "match_rms_adamw", "rest": 1.0},
        over_hidden,
    ),
}


def load_class(name: str, source: str) -> type[Optimizer]:
    """Imports an optimizer's class.

    Args:
        name: The contestant that needs it.
        source: Module and class.

    Returns:
        The class.

    Raises:
        MissingExtraError: If the package is missing.
        UsageError: If torch is too old to have it.
    """
    module, _, attribute = source.partition(":")
    try:
        found: type[Optimizer] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingExtraError(module.replace("_", "-"), f"the contestant {name!r}") from error
    except AttributeError as error:
        raise UsageError(f"the contestant {name!r} needs a newer torch: {error}.") from error
    return found


def base_defaults(part: Part) -> Keywords:
    """The options that a base takes.

    Args:
        part: The base.

    Returns:
        Each with the value that it has unless told otherwise.
    """
    row = BASES[part.name]
    return defaults_of(load_class(part.name, row.source)) | dict(row.defaults)


def options_of(contestant: Contestant) -> dict[str, Keywords]:
    """Every option of a contestant, those left as they are included.

    Args:
        contestant: The contestant.

    Returns:
        For its base and its wrapper, the options with their values.
    """
    base, wrapper = contestant.base, contestant.wrapper
    options = {"base": base_defaults(base) | dict(base.options)}
    if wrapper:
        options["wrapper"] = wrapper_defaults(wrapper, base.name) | dict(wrapper.options)
    return options


def _check_options(part: Part, defaults: Callable[[Part], Keywords]) -> None:
    for key in part.options:
        if key not in (known := defaults(part)):
            raise UnknownNameError(f"option of {part.name}", key, sorted(known))


def check_names(contestant: Contestant) -> None:
    """Makes sure that a contestant's names and options exist.

    Args:
        contestant: The contestant.

    Raises:
        UnknownNameError: If one does not.
        UsageError: If a wrapper has no base.
    """
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
    _check_options(base, base_defaults)
    if wrapper:
        _check_options(wrapper, wrapper_defaults)


def build(contestant: Contestant, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """Makes a contestant's optimizer.

    Args:
        contestant: The contestant; its names are known to exist.
        model: The model that it trains.
        lr: The learning rate.
        weight_decay: The weight decay.

    Returns:
        The optimizer.
    """
    row = BASES[contestant.base.name]
    keywords = {**row.defaults, "weight_decay": weight_decay, **contestant.base.options, "lr": lr}
    base = row.make(load_class(contestant.base.name, row.source), model, keywords)
    wrapper = contestant.wrapper
    return wrap(wrapper, model, base, contestant.base.name) if wrapper else base


def check(contestant: Contestant, model: nn.Module) -> None:
    """Makes sure that a contestant can be made, before anything runs.

    Args:
        contestant: The contestant.
        model: A model that may be spoilt.

    Raises:
        UsageError: If a name or the value of an option is wrong.
    """
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
    """Makes sure that contestants can be made, each for a model of its own.

    Args:
        contestants: The contestants.
        make: Makes a model.

    Raises:
        UsageError: If a name or the value of an option is wrong.
    """
    for contestant in contestants:
        check(contestant, make())


def centre(contestant: Contestant, task: str) -> float:
    """The learning rate at the centre of a contestant's grid.

    Args:
        contestant: The contestant.
        task: The task.

    Returns:
        The option `lr` of the base where it is given, else the table's.
    """
    base = contestant.base
    given = base.options.get("lr")
    if isinstance(given, int | float):
        return float(given)
    known = known_rate(contestant, task)
    return BASES[base.name].rate if known is None else known


def grid(middle: float, trials: int) -> list[float]:
    """Learning rates around a middle, nearest first, a factor of two apart.

    Args:
        middle: The first of them.
        trials: How many.

    Returns:
        Such as `[c, 2 c, c / 2, 4 c, c / 4]`, rounded to three digits.
    """
    exponents = [(index + 1) // 2 * (1 if index % 2 else -1) for index in range(trials)]
    return [float(f"{middle * 2.0**exponent:.3g}") for exponent in exponents]
