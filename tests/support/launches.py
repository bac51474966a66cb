"""Many cases in one launch of several processes, run when a test first asks for one of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes import (
    TIMEOUT,
    Failure,
    Outcome,
    Place,
    Work,
    complaint,
    described,
    outcomes,
    save,
)


class Results(Mapping[str, list[Any]]):
    """What each process returned in each case; a case that failed fails the test that asks.

    Processes end with the first case that fails on any of them, so that nothing of it is left for
    the next one, and others go on with what remains.
    """

    def __init__(self, run: Work, world: int, folder: Path, names: Sequence[str], **limits: float):
        self.world, self.folder, self.names = world, folder, list(names)
        self.ended: dict[str, list[Outcome]] = {}
        folder.mkdir()
        limit = time.monotonic() + limits.pop("timeout", TIMEOUT)
        first = 0
        while first < len(names) and (left := limit - time.monotonic()) > 0:
            todo = list(enumerate(names))[first:]
            ended = outcomes(_each, world, folder, run, todo, timeout=left, **limits)
            self.ended |= dict.fromkeys(names[first:], ended)
            while first < len(names) and self._whole(first):
                first += 1
            first += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> list[Any]:
        bad = [
            f"process {rank}, after {failure.seconds:.1f} s:\n{failure.trace}"
            for rank, failure in enumerate(self.failures(name))
            if failure is not None
        ]
        if bad:
            pytest.fail("\n\n".join(bad), pytrace=False)
        return [self._load(name, rank)["value"] for rank in range(self.world)]

    def failures(self, name: str) -> list[Failure | None]:
        """What each process raised in a case."""
        found = [self._load(name, rank)["failure"] for rank in range(self.world)]
        return [None if failure is None else Failure(**failure) for failure in found]

    def seconds(self, name: str) -> float:
        """How long a case took, on the process that was last to end it."""
        return max(self._load(name, rank)["seconds"] for rank in range(self.world))

    def _load(self, name: str, rank: int) -> dict[str, Any]:
        path = self._path(self.names.index(name), rank)
        if path.exists():
            return torch.load(path, weights_only=True)
        ended = self.ended.get(name)
        why = "the time was up before" if ended is None else complaint(rank, ended[rank])
        pytest.fail(f"{name}: no result. {why}", pytrace=False)

    def _whole(self, number: int) -> bool:
        there = all(self._path(number, rank).exists() for rank in range(self.world))
        return there and not any(self.failures(self.names[number]))

    def _path(self, number: int, rank: int) -> Path:
        return self.folder / f"{rank}-{number}.pt"


class Launches:
    """The cases of a file, run together once per number of processes, when first asked for."""

    def __init__(self, run: Work, request: pytest.FixtureRequest, folder: Path, **limits: float):
        self.run, self.folder, self.limits = run, folder, limits
        self.results: dict[int, Results] = {}
        self.wanted: dict[int, dict[str, None]] = {}
        for item in request.session.items:
            if item.path == request.path and hasattr(item, "callspec"):
                how = item.callspec.params
                if {"world", "name"} <= how.keys():
                    self.wanted.setdefault(how["world"], {})[how["name"]] = None

    @property
    def names(self) -> list[str]:
        """Every case that a test asks for."""
        return list(dict.fromkeys(name for names in self.wanted.values() for name in names))

    def __call__(self, world: int) -> Results:
        if world not in self.results:
            names, folder = list(self.wanted[world]), self.folder / str(world)
            self.results[world] = Results(self.run, world, folder, names, **self.limits)
        return self.results[world]


def launches_of(run: Work, **limits: float) -> Any:
    """The fixture `launches` of a file whose cases `run` runs."""

    @pytest.fixture(scope="module", name="launches")
    def fixture(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Launches:
        return Launches(run, request, tmp_path_factory.mktemp(request.path.stem), **limits)

    return fixture


def _each(place: Place, run: Work, cases: Sequence[tuple[int, str]]) -> None:
    """Each case in a group of its own, until one fails."""
    for number, name in cases:
        path, start = place.folder / f"{place.rank}-{number}.pt", time.monotonic()
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings(), place.group(name):
                warnings.simplefilter("error")
                found = {"value": run(place, name), "failure": None}
        except Exception as error:
            save({"value": None, "failure": described(error, start), "seconds": 0.0}, path)
            place.meet(name, False)
            raise
        save(found | {"seconds": time.monotonic() - start}, path)
        del found
        if not place.meet(name, True):
            return
