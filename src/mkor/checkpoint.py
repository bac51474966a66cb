"""The wrapper's own entries in ``optimizer.state``: put in, taken out, saved and loaded.

Every parameter of the optimizer has ``mkor_counters``; weights that have factors have one entry per
tensor of their state besides. All are views into the batches' buffers, so loading copies into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mkor.step.batches import Batch

__all__ = [
    "PREFIX",
    "VERSION",
    "Entries",
    "all_parameters",
    "counters",
    "materialized",
    "read_counters",
    "split",
]

PREFIX = "mkor_"
VERSION = 1
_FIELDS = ("version", "steps", "updates", "passes")
_ANEW = f"remove its entries that begin with {PREFIX} to start the factors anew"
_NOT_THE_BASES = frozenset(
    ("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr", "param_names")
)
"""Options that schedulers, and named parameters, add to a group."""


def counters() -> Tensor:
    """What every parameter's entry holds.

    Returns:
        ``[4]`` int64 on the CPU: version of the format, steps, updates, micro-batches a step.
    """
    return torch.tensor([VERSION, 0, 0, 1], device="cpu")


def read_counters(saved: Mapping[Tensor, Mapping[str, Any]]) -> tuple[int, int, int]:
    """Read and check what every entry of a checkpoint repeats.

    Args:
        saved: The wrapper's part of a checkpoint, by parameter; may be empty.

    Returns:
        Steps, updates and micro-batches a step; those of a new optimizer if there is no entry.

    Raises:
        ValueError: The checkpoint comes from a newer version, or is damaged.
    """
    found = next((entry.get(PREFIX + "counters") for entry in saved.values()), counters())
    numbers = found.tolist() if isinstance(found, Tensor) and found.numel() == len(_FIELDS) else [0]
    if numbers[0] < 1:
        raise ValueError(
            f"the checkpoint's entries lack a valid {PREFIX}counters, so it is damaged: load "
            f"another one, or {_ANEW}"
        )
    version, steps, updates, passes = (int(value) for value in numbers)
    if version > VERSION:
        raise ValueError(
            f"the checkpoint has format {version}, this version of mkor reads up to {VERSION}: "
            "update mkor to load it"
        )
    return steps, updates, passes


class Entries:
    """The wrapper's entries, by parameter.

    Args:
        batches: The layers with factors.
        parameters: All parameters of the optimizer.
        shared: What every parameter's entry holds, by name.
    """

    def __init__(
        self, batches: Iterable[Batch], parameters: Iterable[Tensor], shared: Mapping[str, Tensor]
    ) -> None:
        self.by_parameter: dict[Tensor, dict[str, Tensor]] = {}
        self._layers: dict[str, Tensor] = {}
        self._known: set[int] = set()
        self._order: list[int] = []
        self.widen(parameters, shared)
        for batch in batches:
            for i, layer in enumerate(batch.layers):
                for key, tensor in batch.state.items():
                    self.by_parameter[layer.weight][PREFIX + key] = tensor[i]
                self._layers[layer.name] = layer.weight

    def __len__(self) -> int:
        return len(self.by_parameter)

    def belong_to(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are the parameters that have entries.

        Args:
            parameters: All parameters of the optimizer.

        Returns:
            Whether no parameter was added, removed or replaced.
        """
        found = list(map(id, parameters))
        return found == self._order or set(found) == self._known

    def widen(self, parameters: Iterable[Tensor], shared: Mapping[str, Tensor]) -> None:
        """Give parameters that have no entry yet one without factors.

        Args:
            parameters: All parameters of the optimizer.
            shared: What every parameter's entry holds, by name.
        """
        common = {PREFIX + key: tensor for key, tensor in shared.items()}
        for parameter in parameters:
            self.by_parameter.setdefault(parameter, dict(common))
            if id(parameter) not in self._known:
                self._known.add(id(parameter))
                self._order.append(id(parameter))

    def put(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Add the entries to an optimizer's state.

        Args:
            state: By parameter.
        """
        for parameter, entry in self.by_parameter.items():
            state.setdefault(parameter, {}).update(entry)

    def take(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Remove the entries again, and what they leave empty.

        Args:
            state: By parameter.
        """
        for parameter, entry in self.by_parameter.items():
            present = state.get(parameter)
            if present is None:
                continue
            for key in entry:
                present.pop(key, None)
            if not present:
                del state[parameter]

    def check(
        self,
        saved: Mapping[Tensor, Mapping[str, Any]],
        names: dict[Tensor, str],
        whole: bool = True,
    ) -> None:
        """Compare a checkpoint with this optimizer before anything is changed.

        Args:
            saved: The wrapper's part of a checkpoint, by parameter.
            names: Of parameters, for messages.
            whole: Whether every factor must be there.

        Raises:
            ValueError: The checkpoint was written with other settings or for another model.
        """
        for parameter, entry in self.by_parameter.items():
            other = saved.get(parameter, {})
            name = names.get(parameter, "a parameter")
            if whole and set(entry) != set(other):
                raise ValueError(
                    f"the checkpoint has other factors for {name}: it lacks "
                    f"{_listed(entry.keys() - other.keys())} and has "
                    f"{_listed(other.keys() - entry.keys())} besides; build the optimizer with the "
                    "settings (sides, skip, hybrid, kind of curvature, frozen layers) that wrote "
                    f"it, or {_ANEW}"
                )
            for key in sorted(entry.keys() & other.keys()):
                shape = getattr(other[key], "shape", None)
                if entry[key].shape != shape:
                    found = "no tensor" if shape is None else f"of shape {tuple(shape)}"
                    raise ValueError(
                        f"the checkpoint's {key} of {name} is {found}, this optimizer's of shape "
                        f"{tuple(entry[key].shape)}: build it with the rank and for the model that "
                        f"wrote it, or {_ANEW}"
                    )

    def copy_layers(self, before: Entries) -> None:
        """Copy factors of layers whose weights have been replaced.

        Args:
            before: The entries of the same layers under their former weights.
        """
        self.copy_from(
            {
                weight: before.by_parameter[before._layers[name]]
                for name, weight in self._layers.items()
                if name in before._layers and before._layers[name] is not weight
            }
        )

    def copy_from(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Copy factors into the batches; what ``saved`` does not have, or in other shapes, stays.

        Args:
            saved: Entries by parameter, already checked where they must fit.
        """
        for parameter, entry in self.by_parameter.items():
            for key, tensor in saved.get(parameter, {}).items():
                known = entry.get(key)
                if known is None or known.shape != tensor.shape or key == PREFIX + "counters":
                    continue
                # What is left to others is a view of a single 0.
                if known.is_contiguous():
                    known.copy_(tensor)


def split(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """Separate the wrapper's entries of a checkpoint from the base optimizer's.

    Args:
        state_dict: As ``state_dict()`` makes it; parameters may be numbered or named.
        groups: The parameter groups of the optimizer that loads it, in the same order.

    Returns:
        The base's state dict, and the wrapper's entries by parameter.

    Raises:
        ValueError: It is no optimizer's, the groups differ in size, or it is another base's.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"this is no optimizer's checkpoint, it holds {', '.join(map(str, state_dict))[:200]}: "
            "pass what optimizer.state_dict() returned"
        )
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the checkpoint has parameter groups of {saved_sizes} parameters, this optimizer of "
            f"{sizes}: build it on the same model, with the same groups"
        )
    for saved_group, group in zip(state_dict["param_groups"], groups, strict=True):
        _check_options(saved_group.keys() - _NOT_THE_BASES, group.keys() - _NOT_THE_BASES)
    saved_keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in groups)
    owner = dict(zip(saved_keys, parameters, strict=True))
    base_state: dict[Any, Any] = {}
    own: dict[Tensor, dict[str, Any]] = {}
    for key, entry in state_dict["state"].items():
        if not isinstance(entry, Mapping):
            base_state[key] = entry
            continue
        theirs = {k: v for k, v in entry.items() if not _is_own(k)}
        mine = {k: v for k, v in entry.items() if _is_own(k)}
        if theirs:
            base_state[key] = theirs
        if mine and key in owner:
            own[owner[key]] = mine
    return {**state_dict, "state": base_state}, own


def _check_options(saved: Set[str], known: Set[str]) -> None:
    """Versions of torch add options; only another optimizer has some more and some less."""
    if saved - known and known - saved:
        raise ValueError(
            f"the checkpoint was written over another base: its groups have "
            f"{_listed(saved - known)} where this base has {_listed(known - saved)}; wrap the base "
            "that wrote it, or pass this base's param_groups (optimizer.state_dict() has them) "
            f"with the entries that begin with {PREFIX} alone, to go on with the factors"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _is_own(key: object) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)


def materialized(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Give released factors memory of their own: some checkpoint formats write into a state dict.

    Args:
        state: The ``state`` of a state dict.

    Returns:
        The same with contiguous tensors in the wrapper's entries.
    """
    return {
        key: {k: v.contiguous() if _is_own(k) else v for k, v in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state.items()
    }


def all_parameters(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Every parameter of some groups, in order.

    Args:
        groups: Parameter groups.

    Returns:
        Parameters.
    """
    return chain.from_iterable(group["params"] for group in groups)
