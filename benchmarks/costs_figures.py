"""What the files of `costs.py` come to: averages over cycles, and who is cheaper."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from costs_rows import (
    BASE,
    COMPUTED,
    EVA,
    EVERY_STEP,
    HALF,
    LOOKS,
    MKOR,
    SOAP,
    SOAP_PERIOD,
    Bar,
    Row,
)
from costs_runs import Record, stored

from mkor.bench import contestants
from mkor.bench.processes_theory import period
from mkor.bench.timing import quartiles, ratios
from mkor.bench.worker import Worker

Quartiles = tuple[float, float, float]


def cycle_of(label: str) -> int:
    """Steps after which what a contestant does repeats itself."""
    contestant = contestants.parse_contestant(label)
    if contestant.base.name == SOAP:
        return int(contestant.base.options.get("precondition_frequency", SOAP_PERIOD))
    return period(contestant)


def is_rare(index: int, warmup: int, cycle: int) -> bool:
    """Whether the work of every so many steps falls on a round; the very first step has it."""
    return (warmup + index) % cycle == 0


@dataclass(frozen=True)
class Found:
    """A contestant's figures.

    `ratio` is the average over a cycle, None where no round had the rare work; `ends` are the
    medians of the rounds without and with it. What was computed from another's rounds, named by
    `source`, has no median and quartiles of its own.
    """

    timing: Record
    record: Record
    cycle: int
    ratio: float | None
    ends: tuple[float, float] | None = None
    source: str = ""

    @property
    def whiskers(self) -> tuple[float, float]:
        return self.ends or (self.timing["low"], self.timing["high"])


def base_of(record: Record) -> Record:
    base: Record = record["timings"][0]
    return base


def over(record: Record, timing: Record, other: Record) -> list[float]:
    """Round by round, one contestant's CPU time over another's."""
    return ratios(timing["cpu_samples"], other["cpu_samples"])


def found_in(record: Record) -> dict[str, Found]:
    """All contestants of a run, those that are computed included."""
    found: dict[str, Found] = {}
    for timing_ in record["timings"]:
        label = timing_["contestant"]
        cycle = cycle_of(label)
        if cycle == 1:
            found[label] = Found(timing_, record, cycle, timing_["ratio"])
            continue
        warmup = record.get("warmup", Worker.warmup_rounds)
        values = list(enumerate(over(record, timing_, base_of(record))))
        parts = [
            [value for index, value in values if is_rare(index, warmup, cycle) is rare]
            for rare in (False, True)
        ]
        if not all(parts):
            found[label] = Found(timing_, record, cycle, None)
            continue
        ends = (statistics.median(parts[0]), statistics.median(parts[1]))
        found[label] = Found(timing_, record, cycle, averaged(ends, cycle), ends)
        for other in COMPUTED.get(label, ()):
            if other not in (each["contestant"] for each in record["timings"]):
                steps = cycle_of(other)
                mean = averaged(ends, steps)
                found[other] = Found(timing_, record, steps, mean, None, label)
    return found


def averaged(ends: tuple[float, float], cycle: int) -> float:
    """One step of a cycle is with the rare work, the others without."""
    return ((cycle - 1) * ends[0] + ends[1]) / cycle


@dataclass(frozen=True)
class Costs:
    """What is known of a row; runs that were not made are None."""

    row: Row
    records: tuple[Record | None, ...]

    @property
    def found(self) -> dict[str, Found]:
        """Everyone, the bars' run first to speak."""
        everyone: dict[str, Found] = {}
        for record in self.records:
            for label, each in found_in(record).items() if record else ():
                everyone.setdefault(label, each)
        order = [BASE, *LOOKS, HALF]
        return {label: everyone[label] for label in order if label in everyone}

    @property
    def beside(self) -> dict[str, Found]:
        """Those of the run with everyone."""
        record = self.records[1] if len(self.records) > 1 else None
        return found_in(record) if record else {}

    @property
    def missing(self) -> list[str]:
        files = (file for _, file in self.row.files())
        return [file for file, record in zip(files, self.records, strict=True) if not record]


def read_all(rows: Iterable[Row], folder: Path) -> list[Costs]:
    """What is there; rows that nobody asked for only if they are."""
    everything = [
        Costs(row, tuple(stored(row, run, folder / file) for run, file in row.files()))
        for row in rows
    ]
    return [costs for costs in everything if any(costs.records) or not costs.row.asked_for]


def value_of(bar: Bar, everything: Sequence[Costs]) -> tuple[float | None, Found | None]:
    """The figure that a bar is about: of its row's first run only."""
    for costs in everything:
        if costs.row.name == bar.row and (record := costs.records[0]):
            found = found_in(record).get(bar.contestant)
            return (found.timing[bar.figure], found) if found else (None, None)
    return None, None


def against_eva(costs: Costs) -> Quartiles | None:
    """MKOR's time over Eva's, round by round: quartiles and median."""
    beside = costs.beside
    if MKOR not in beside or EVA not in beside:
        return None
    mkor, eva = beside[MKOR], beside[EVA]
    return quartiles(over(mkor.record, mkor.timing, eva.timing))


def ratio_in(found: Mapping[str, Found], label: str) -> float | None:
    return found[label].ratio if label in found else None


def is_cheapest(costs: Costs) -> bool | None:
    """Whether MKOR takes less than all that update at every step; None if not all are known.

    One that takes less settles it, whoever is missing.
    """
    own = ratio_in(costs.beside, MKOR)
    theirs = [ratio_in(costs.beside, label) for label in EVERY_STEP.values()]
    if own is None:
        return None
    if any(their is not None and their <= own for their in theirs):
        return False
    return None if None in theirs else True
