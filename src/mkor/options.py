"""The wrapper's keywords, and checks of arguments at the earliest moment, with a way out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mkor.curvature.base import Curvature
from mkor.distributed.fsdp import check_sharding
from mkor.hybrid import LossRateSwitch
from mkor.layers.selection import Skip

_STAND_INS = {"AcceleratedOptimizer", "LightningOptimizer"}


class WrapperOptions(TypedDict, total=False):
    """The keywords that every optimizer hands on to :class:`mkor.Preconditioned` as they are."""

    skip: Skip
    skip_output: bool
    sides: str
    nonfinite: str
    hybrid: LossRateSwitch | None
    reduce: str
    process_group: Any


@dataclass
class Options:
    """The wrapper's keywords; see :class:`mkor.Preconditioned`."""

    update_every: int
    rescale: str | None
    kl_clip: float | None
    skip: Skip
    skip_output: bool
    sides: str
    nonfinite: str
    hybrid: LossRateSwitch | None
    reduce: str
    process_group: Any

    def facts(self) -> dict[str, str]:
        """What must be the same on all processes, by name; what is skipped shows in the layers."""
        apart = ("skip", "process_group")
        names = (field.name for field in fields(self) if field.name not in apart)
        return {name: repr(getattr(self, name)) for name in names}

    def check(self, curvature: Curvature) -> None:
        """Refuse values of a wrong type or out of range, and what does not go together."""
        check_update_every(self.update_every)
        if not isinstance(self.skip_output, bool):
            raise TypeError(f"skip_output must be True or False, got {self.skip_output!r}")
        check_choice("rescale", self.rescale, "running", "step", None)
        check_choice("sides", self.sides, "both", "left", "right")
        check_choice("nonfinite", self.nonfinite, "propagate", "skip")
        _check_kl_clip(self.kl_clip, self.rescale)
        if self.hybrid is not None and not isinstance(self.hybrid, LossRateSwitch):
            raise TypeError(
                f"hybrid must be a mkor.LossRateSwitch(...) or None, got {self.hybrid!r}"
            )
        if self.reduce not in ("mean", "gather"):
            raise ValueError(f"reduce must be 'mean' or 'gather', got {self.reduce!r}")
        if self.reduce == "gather" and not curvature.gathers:
            raise ValueError(
                f"reduce='gather' keeps the processes' vectors apart, but "
                f"{type(curvature).__name__} takes one mean over all rows: use reduce='mean'"
            )


def check_update_every(value: object) -> None:
    """Refuse what is no whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"update_every must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"update_every must be at least 1, got {value}")


def check_choice(name: str, value: object, *allowed: object) -> None:
    """Refuse what is not among the allowed values."""
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


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


def vectors_per_process(curvature: Curvature, reduce: str, processes: int) -> int:
    """Vectors that this process adds to in an update: all of them, or its share of whole ones."""
    if reduce == "mean":
        return int(curvature.vectors)
    share = -(-curvature.vectors // processes)
    rank = getattr(curvature, "rank", None)
    if rank is not None and share * processes > rank:
        raise ValueError(
            f"reduce='gather' gives each of {processes} processes {share} vectors per update, more "
            f"than rank={rank} in all: raise rank, or use reduce='mean'"
        )
    return int(share)


def check_model(model: object) -> None:
    """Refuse what cannot be watched."""
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
    """Refuse a base that the wrapper cannot step."""
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
    """Refuse what is no kind of factor."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"curvature must be a kind of factor such as mkor.Window(), got {curvature!r}; one of "
            "your own derives from mkor.Curvature"
        )


def check_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """See whether the base still holds the model's parameters."""
    current = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in current for group in groups for parameter in group["params"]):
        raise RuntimeError(
            "the base optimizer holds none of the model's present parameters: they were "
            "replaced after it was built, as fully_shard does; shard the model first, then "
            "build the base and wrap it"
        )


def check_rates(groups: Iterable[Mapping[str, object]]) -> None:
    """``kl_clip`` needs to know how long a step is."""
    if any("lr" not in group for group in groups):
        raise ValueError(
            "kl_clip needs the learning rate 'lr' of every parameter group, which this base does "
            "not have: pass kl_clip=None and, for instance, rescale='running'"
        )
