"""Checks of arguments, at the earliest moment and with a way out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mkor.communication.sharding import check_sharding
from mkor.curvature.contract import Curvature
from mkor.hybrid import LossRateSwitch

__all__ = [
    "check_base",
    "check_curvature",
    "check_model",
    "check_options",
    "check_parameters",
    "check_rates",
    "check_reduce",
]


_STAND_INS = {"AcceleratedOptimizer", "LightningOptimizer"}


def check_model(model: object) -> None:
    """Refuse what cannot be watched.

    Args:
        model: Should be a module with ordinary parameters.

    Raises:
        TypeError: It is no module, or wrapped in something that replicates or flattens parameters.
        ValueError: It is not initialised yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: call "
            "MKOR(model, optimizer)"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel replicates the model in every step and hides its layers: use "
                "torch.nn.parallel.DistributedDataParallel"
            )
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(
                "FSDP1 flattens parameters, so layers have no matrices: train with fully_shard "
                "(FSDP2) or DDP"
            )
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            if is_lazy(parameter):
                raise ValueError(
                    f"{full} is not initialised: run one forward pass before wrapping the optimizer"
                )
    check_sharding(model)


def check_base(model: nn.Module, optimizer: object, wrapper: type[Optimizer]) -> None:
    """Refuse a base that the wrapper cannot step.

    Args:
        model: The model it should train.
        optimizer: Should be a torch optimizer.
        wrapper: The wrapper's own class.

    Raises:
        TypeError: It is no optimizer, already wrapped, or needs a closure.
        ValueError: It holds none of the model's parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: build one "
            "first, for instance torch.optim.AdamW(model.parameters(), lr=1e-3)"
        )
    if isinstance(optimizer, wrapper):
        raise TypeError(f"optimizer is already a {type(optimizer).__name__}: pass its .base")
    if any(kind.__name__ in _STAND_INS for kind in type(optimizer).__mro__):
        raise TypeError(
            f"optimizer is a framework's {type(optimizer).__name__}, which may skip steps behind "
            "the wrapper's back: wrap your own optimizer first, then prepare the result"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the model inside step() and cannot be wrapped: "
            "use an optimizer whose step() needs no closure"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer holds none of the model's parameters: build it from this model's "
            "parameters()"
        )


def check_curvature(curvature: object) -> None:
    """Refuse what is no kind of factor.

    Args:
        curvature: Should have the methods of ``mkor.curvature.contract.Curvature``.

    Raises:
        TypeError: It has not.
    """
    needed = [name for name in vars(Curvature) if not name.startswith("_")]
    missing = [name for name in needed if not hasattr(curvature, name)]
    if missing or isinstance(curvature, type):
        raise TypeError(
            "curvature must be a kind of factor such as mkor.Window(), got "
            f"{curvature!r}" + (f", which lacks {', '.join(missing)}" if missing else "")
        )


def check_options(
    *,
    update_every: object,
    rescale: object,
    kl_clip: object,
    sides: object,
    nonfinite: object,
    skip_output: object,
    hybrid: object,
) -> None:
    """Check the wrapper's keywords.

    Args:
        update_every: A whole number from 1.
        rescale: ``"running"``, ``"step"`` or None.
        kl_clip: A positive number, or None; not beside ``rescale``.
        sides: ``"both"``, ``"left"`` or ``"right"``.
        nonfinite: ``"propagate"`` or ``"skip"``.
        skip_output: A bool.
        hybrid: A ``LossRateSwitch`` or None.

    Raises:
        TypeError: One has the wrong type.
        ValueError: One is out of range.
    """
    if isinstance(update_every, bool) or not isinstance(update_every, int):
        raise TypeError(f"update_every must be a whole number, got {update_every!r}")
    if update_every < 1:
        raise ValueError(f"update_every must be at least 1, got {update_every}")
    if not isinstance(skip_output, bool):
        raise TypeError(f"skip_output must be True or False, got {skip_output!r}")
    choices = {
        "rescale": (rescale, ("running", "step", None)),
        "sides": (sides, ("both", "left", "right")),
        "nonfinite": (nonfinite, ("propagate", "skip")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            listed = ", ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    _check_kl_clip(kl_clip, rescale)
    if hybrid is not None and not isinstance(hybrid, LossRateSwitch):
        raise TypeError(f"hybrid must be a mkor.LossRateSwitch(...) or None, got {hybrid!r}")


def check_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """See whether the base still holds the model's parameters.

    Args:
        model: The model.
        groups: The base's parameter groups.

    Raises:
        RuntimeError: They have been replaced since.
    """
    current = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in current for group in groups for parameter in group["params"]):
        raise RuntimeError(
            "the base optimizer holds none of the model's present parameters: they were "
            "replaced after it was built, as fully_shard does; shard the model first, then "
            "build the base and wrap it"
        )


def check_rates(groups: Iterable[Mapping[str, object]]) -> None:
    """``kl_clip`` needs to know how long a step is.

    Args:
        groups: Parameter groups of the base.

    Raises:
        ValueError: One has no learning rate.
    """
    if any("lr" not in group for group in groups):
        raise ValueError(
            "kl_clip needs the learning rate 'lr' of every parameter group, which this base does "
            "not have: pass kl_clip=None and, for instance, rescale='running'"
        )


def check_reduce(reduce: object, curvature: Curvature) -> None:
    """Check how processes share an update's vectors.

    Args:
        reduce: ``"mean"`` or ``"gather"``.
        curvature: The kind of factor.

    Raises:
        ValueError: There is no such way, or the curvature takes one mean over all rows.
    """
    if reduce not in ("mean", "gather"):
        raise ValueError(f"reduce must be 'mean' or 'gather', got {reduce!r}")
    if reduce == "gather" and not curvature.gathers:
        raise ValueError(
            f"reduce='gather' keeps the processes' vectors apart, but {type(curvature).__name__} "
            "takes one mean over all rows: use reduce='mean'"
        )


def _check_kl_clip(kl_clip: object, rescale: object) -> None:
    if kl_clip is None:
        return
    if isinstance(kl_clip, bool) or not isinstance(kl_clip, int | float):
        raise TypeError(f"kl_clip must be a number or None, got {kl_clip!r}")
    if not 0 < kl_clip < float("inf"):
        raise ValueError(f"kl_clip must be positive and finite, got {kl_clip}")
    if rescale is not None:
        raise ValueError(
            f"kl_clip={kl_clip} and rescale={rescale!r} both set the gradients' length: pass "
            "rescale=None or kl_clip=None"
        )
