"""The wrapper's own entries in ``optimizer.state``: put in, taken out, saved and loaded.

Every parameter of the optimizer has ``mkor_counters``; weights that have factors have one entry per
tensor of their state besides. All are views into the groups' state, so loading copies into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mkor.step.groups import LayerGroup

PREFIX = "mkor_"
VERSION = 2
_OBSOLETE = "_gram"
"""Ends the names of entries that version 1 kept beside what they follow from."""

_FIELDS = ("version", "steps", "updates", "passes")
_ANEW = f"remove its entries that begin with {PREFIX} to start the factors anew"
_NOT_THE_BASES = frozenset(
    ("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr", "param_names")
)
"""Options that schedulers, and named parameters, add to a group."""


def counters() -> Tensor:
    """What every parameter's entry holds."""
    return torch.tensor([VERSION, 0, 0, 1], device="cpu")


def read_counters(saved: Mapping[Tensor, Mapping[str, Any]]) -> tuple[int, int, int]:
    """Read and check what every entry of a checkpoint repeats."""
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


class StateEntries:
    """The wrapper's entries in the base's state, by parameter.

    They are put in when somebody reads the state, and taken out before the base works on it: bases
    initialise a parameter's state when it is empty, so theirs must be all they see.

    Args:
        base: The optimizer whose state it is.

    Attributes:
        by_parameter: The entries.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self.by_parameter: dict[Tensor, dict[str, Tensor]] = {}
        self._weights: dict[str, Tensor] = {}
        self._order: list[int] = []
        # There is something to publish from the first step on.
        self._begun = self._published = self._ended = False

    def renew(self, groups: Iterable[LayerGroup], shared: Mapping[str, Tensor]) -> None:
        """Point the entries at the groups' state, which is new or has moved.

        ``shared`` is what every parameter's entry holds, by name.
        """
        self.withdraw()
        self._ended = False
        self.by_parameter, self._weights, self._order = {}, {}, []
        self._widen(shared)
        for group in groups:
            for i, layer in enumerate(group.layers):
                for key, tensor in group.state.items():
                    self.by_parameter[layer.weight][PREFIX + key] = tensor[i]
                self._weights[layer.name] = layer.weight

    def _widen(self, shared: Mapping[str, Tensor]) -> None:
        """Give parameters that have no entry yet one without factors."""
        common = {PREFIX + key: tensor for key, tensor in shared.items()}
        for parameter in all_parameters(self._base.param_groups):
            if parameter not in self.by_parameter:
                self.by_parameter[parameter] = dict(common)
                self._order.append(id(parameter))

    def belong_to(self, parameters: Iterable[Tensor]) -> bool:
        """Whether no parameter was added, removed or replaced."""
        found = list(map(id, parameters))
        return found == self._order or set(found) == set(self._order)

    def begin(self) -> None:
        """Publish the entries from now on."""
        self._begun = True

    def publish(self) -> None:
        """Put the entries into the base's state, which is about to be read."""
        if self._begun and not self._ended:
            # Again, if they are there: somebody may have replaced the state since.
            self._published = True
            self._put()

    def withdraw(self) -> None:
        """Take the entries out again, before the base works on its state."""
        if self._published:
            self._published = False
            self._take()

    def end(
        self, groups: Iterable[LayerGroup] = (), shared: Mapping[str, Tensor] | None = None
    ) -> None:
        """Publish nothing any more, but in checkpoints the entries of a switched hybrid."""
        if shared is None:
            self.withdraw()
            self.by_parameter, self._weights, self._order = {}, {}, []
        else:
            self.renew(groups, shared)
        self._ended = True

    @contextmanager
    def saved(self, shared: Mapping[str, Tensor]) -> Iterator[None]:
        """The entries are in the base's state, even after the switch: a checkpoint keeps them."""
        hidden = self._ended and len(self.by_parameter) > 0
        if hidden:
            self._widen(shared)
            self._put()
        try:
            yield
        finally:
            if hidden:
                self._take()

    def _put(self) -> None:
        state = self._base.state
        for parameter, entry in self.by_parameter.items():
            state.setdefault(parameter, {}).update(entry)

    def _take(self) -> None:
        state = self._base.state
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
        """Compare a checkpoint with this optimizer before anything is changed."""
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

    def snapshot(self) -> tuple[dict[Tensor, dict[str, Tensor]], dict[str, Tensor]]:
        """The present entries by parameter, and each layer's weight."""
        return self.by_parameter, self._weights

    def take_over(self, before: tuple[dict[Tensor, dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Copy the factors of a snapshot, also of layers whose weights have been replaced."""
        entries, weights = before
        self.copy_from(entries)
        self.copy_from(
            {
                weight: entries[weights[name]]
                for name, weight in self._weights.items()
                if name in weights and weights[name] is not weight
            }
        )

    def copy_from(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Copy factors into the groups; what ``saved`` lacks, or has in other shapes, stays."""
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
    """Separate the wrapper's entries of a checkpoint from the base optimizer's."""
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
        mine = {k: v for k, v in entry.items() if _is_own(k) and not k.endswith(_OBSOLETE)}
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
    """Give released factors memory of their own: some formats write into a state dict."""
    return {
        key: {k: v.contiguous() if _is_own(k) else v for k, v in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state.items()
    }


def all_parameters(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Every parameter of some groups, in order."""
    return chain.from_iterable(group["params"] for group in groups)
