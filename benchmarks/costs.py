"""What MKOR costs in time and memory, beside every other optimizer: all that the project claims.

Runs `mkor overhead` for one subject after another, each run in a process of its own, with one
thread, statistics at every step and the contestants in turn:

    .venv/bin/python benchmarks/costs.py --out docs/results/costs
    .venv/bin/python benchmarks/costs.py --out docs/results/costs --rows mlp-64-64,conv-net
    .venv/bin/python benchmarks/costs.py --out docs/results/costs --page-only

A row has up to two runs. The first, with many rounds, has AdamW and MKOR over it alone and gives
the figures that the bars are about; the second has everyone and gives the comparisons, each within
its own run. The folder keeps a JSON file of each run, as `mkor overhead --json` writes it;
`costs.md` and `costs.png` are made of these files and of nothing else. --resume keeps those that
are there, made for the same subject and contestants (leave it out when the code has changed).

Where work is done only every so many steps, whether it falls on a round is known from the round's
number: the average over a cycle is made of the median of the rounds with that work and of those
without, weighted as they occur. The same two medians give KFAC with other numbers of steps between
inversions, and optimizers that update every 10 steps as they would be at every step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mkor.bench import cli, contestants
from mkor.bench.arguments import names, whole
from mkor.bench.compare import INTERRUPTED
from mkor.bench.curves import COLOURS, GREY, lighter
from mkor.bench.errors import UnknownNameError, UsageError
from mkor.bench.places import prepare_folder
from mkor.bench.processes_theory import period
from mkor.bench.tables import bytes_text, print_table
from mkor.bench.timing import quartiles, ratios
from mkor.bench.worker import Worker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Quartiles = tuple[float, float, float]

BASE, MKOR, EVA = "adamw", "mkor+adamw", "eva+adamw"
SMALL, SELDOM = "mkor[rank=16]+adamw", "mkor[update_every=10]+adamw"
HALF = "mkor[factor_dtype=bfloat16]+adamw"
KFAC_1, KFAC_10, KFAC_50 = (f"kfac[inverse_every={steps}]+adamw" for steps in (1, 10, 50))
DENSE_1, DENSE_10 = (f"dense-mkor[update_every={steps}]+adamw" for steps in (1, 10))
SOAP, LAMB, MUON = "soap", "lamb", "muon"
SOAP_1 = "soap[precondition_frequency=1]"
SOAP_PERIOD = 10
"""Steps between SOAP's decompositions, as its package has it."""
COMPUTED = {KFAC_10: (KFAC_1, KFAC_50), DENSE_10: (DENSE_1,), SOAP: (SOAP_1,)}
"""Who else is known from a contestant's rounds, where it was not measured itself."""
EVERY_STEP = {"KFAC": KFAC_1, "SOAP": SOAP, "DenseMKOR": DENSE_1}
RARELY = {
    "SOAP at every step": SOAP_1,
    "KFAC at 10": KFAC_10,
    "KFAC at 50": KFAC_50,
    "DenseMKOR at 10": DENSE_10,
}

LOOKS: Mapping[str, tuple[str, str, bool]] = {
    MKOR: ("MKOR", COLOURS[1], True),
    SMALL: ("MKOR, rank 16", lighter(COLOURS[1]), True),
    SELDOM: ("MKOR, every 10", COLOURS[1], False),
    EVA: ("Eva", COLOURS[4], True),
    DENSE_1: ("DenseMKOR", COLOURS[2], True),
    DENSE_10: ("DenseMKOR, every 10", COLOURS[2], False),
    KFAC_1: ("KFAC", COLOURS[0], True),
    KFAC_10: ("KFAC, inverse every 10", COLOURS[0], False),
    KFAC_50: ("KFAC, inverse every 50", lighter(COLOURS[0]), False),
    SOAP: ("SOAP", COLOURS[3], True),
    LAMB: ("LAMB", COLOURS[5], True),
    MUON: ("Muon", COLOURS[6], True),
}
"""Name, colour and whether it works at every step; in the order of tables and picture."""

TINY = {"width": 16, "depth": 2, "rows": 32, "batch": 2, "context": 8}
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
RUN = "run"
"""The hidden command that is one run's process."""
BUSY = 1.05
"""Wall over CPU time from which the machine had other things to do."""
NOT_MEASURED = "not measured"
WHAT = {"ratio": "time", "extra_memory": "memory"}
"""What a bar's figure is about."""


# ------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Run:
    """One process.

    `seconds` is what it takes on a quiet core; only the time left is told by it.
    """

    contestants: tuple[str, ...]
    rounds: int
    seconds: float
    profiled: int = 3
    warmup: int = 5
    limits: bool = False


@dataclass(frozen=True)
class Row:
    """A subject; its first run is the bars', its second everyone's."""

    name: str
    model: str
    sizes: Mapping[str, int]
    runs: tuple[Run, ...]
    asked_for: bool = False
    drawn: bool = True

    def files(self) -> Iterator[tuple[Run, str]]:
        for run, ending in zip(self.runs, ("", "-others"), strict=False):
            yield run, f"{self.name}{ending}.json"

    @property
    def title(self) -> str:
        return f"{self.model}: " + ", ".join(f"{key} {size:,}" for key, size in self.sizes.items())


@dataclass(frozen=True)
class Bar:
    """The most that a figure may be; `floor` is what its arithmetic alone comes to."""

    row: str
    contestant: str
    most: float
    floor: float | None = None
    figure: str = "ratio"


MODELS_OWN = (SELDOM, EVA, MUON, KFAC_10, DENSE_10, SOAP)
MLPS_OWN = (SMALL, SELDOM, EVA, LAMB, MUON, KFAC_1, KFAC_10, DENSE_1, DENSE_10, SOAP)


def bars_run(rounds: int, seconds: float, *more: str) -> Run:
    return Run((BASE, MKOR, *more), rounds, seconds, limits=True)


def mlp(width: int, rows: int, *runs: Run, depth: int = 4) -> Row:
    return Row(f"mlp-{width}-{rows}", "mlp", {"width": width, "depth": depth, "rows": rows}, runs)


def others(labels: Sequence[str], rounds: int, seconds: float, profiled: int = 3) -> Run:
    return Run((BASE, MKOR, *labels), rounds, seconds, profiled)


def transformer(width: int, depth: int, batch: int, *runs: Run, asked_for: bool = False) -> Row:
    sizes = {"width": width, "depth": depth, "batch": batch, "context": 256}
    return Row(f"transformer-{width}", "transformer", sizes, runs, asked_for)


# KFAC inverts in steps 0 and 10: after 5 untimed steps, 6 rounds are the fewest that show it.
ALL = (
    mlp(512, 4096, bars_run(40, 38), others(MLPS_OWN, 10, 90)),
    mlp(1024, 4096, bars_run(30, 96), others(MLPS_OWN, 6, 230, profiled=1)),
    mlp(256, 4096, bars_run(60, 22), others(MLPS_OWN, 20, 46)),
    mlp(512, 1024, bars_run(60, 19), others(MLPS_OWN, 20, 48)),
    mlp(
        64,
        64,
        bars_run(200, 12, SMALL),
        others([each for each in MLPS_OWN if each != SMALL], 60, 15, profiled=10),
        depth=16,
    ),
    transformer(64, 4, 8, bars_run(60, 22), others(MODELS_OWN, 20, 28)),
    transformer(256, 2, 8, bars_run(40, 40), others(MODELS_OWN, 10, 68)),
    transformer(1024, 1, 4, bars_run(20, 68), others(MODELS_OWN, 6, 260, profiled=1)),
    Row(
        "bert-base-block",
        "bert-base-block",
        {"width": 768, "depth": 1, "batch": 4, "context": 512},
        (bars_run(30, 92), others(MODELS_OWN, 6, 190, profiled=1)),
    ),
    Row(
        "conv-net",
        "conv-net",
        {"width": 16, "depth": 3, "batch": 64},
        # Without Muon, which is for the matrices of linear layers.
        (
            bars_run(60, 46),
            others([each for each in MODELS_OWN if each != MUON], 15, 75),
        ),
    ),
    Row(
        "memory",
        "mlp",
        {"width": 1024, "depth": 4, "rows": 256},
        (Run((BASE, MKOR, HALF), 3, 12),),
        drawn=False,
    ),
    transformer(
        2048,
        1,
        4,
        replace(bars_run(6, 100), profiled=1),
        others((SELDOM, EVA), 6, 220, profiled=1),
        asked_for=True,
    ),
)
ROWS: Mapping[str, Row] = {row.name: row for row in ALL}

BARS = (
    Bar("mlp-512-4096", MKOR, 1.04),
    Bar("mlp-1024-4096", MKOR, 1.04),
    Bar("mlp-256-4096", MKOR, 1.06),
    Bar("mlp-512-1024", MKOR, 1.15, 1.09),
    Bar("mlp-64-64", MKOR, 2.6, 2.33),
    Bar("mlp-64-64", SMALL, 1.6, 1.33),
    Bar("memory", MKOR, 0.034, figure="extra_memory"),
    Bar("memory", HALF, 0.018, figure="extra_memory"),
    Bar("conv-net", MKOR, 1.08),
    Bar("bert-base-block", MKOR, 1.07),
)


def planned(row: Row, arguments: argparse.Namespace) -> Row:
    """The row with the rounds, and at the sizes, that the command line asks for."""
    runs = row.runs
    if arguments.tiny:
        row = replace(row, sizes={key: min(TINY[key], size) for key, size in row.sizes.items()})
        runs = tuple(replace(run, rounds=2, warmup=1, profiled=1) for run in runs)
    if arguments.rounds:
        runs = tuple(replace(run, rounds=arguments.rounds) for run in runs)
    return replace(row, runs=runs)


# ----------------------------------------------------------------------------------- measuring it


def overhead_words(row: Row, run: Run) -> list[str]:
    """The options of `mkor overhead`."""
    sizes = [word for key, size in row.sizes.items() for word in (f"--{key}", str(size))]
    words = [",".join(run.contestants), "--model", row.model, *sizes]
    return [*words, "--rounds", str(run.rounds), *(["--limits"] if run.limits else [])]


def run_here(words: Sequence[str]) -> int:
    """A run, in its own process: `mkor overhead` with less warming up and profiling."""
    warmup, profiled, *rest = words
    Worker.warmup_rounds, Worker.profiled_rounds = int(warmup), int(profiled)
    return cli.main(["overhead", *rest])


def measure(row: Row, run: Run, path: Path, *, quiet: bool) -> bool:
    """Runs a process and keeps its file; False if it failed."""
    unfinished = path.with_suffix(".part")
    words = [*overhead_words(row, run), "--threads", "1", "--json", str(unfinished)]
    words = [RUN, str(run.warmup), str(run.profiled), *words, *(["--quiet"] if quiet else [])]
    try:
        status = subprocess.run(
            [sys.executable, __file__, *words],
            check=False,
            env=os.environ | QUIET,
            stdout=subprocess.DEVNULL,
        ).returncode
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status == 0:
            record = json.loads(unfinished.read_text(encoding="utf-8"))
            record |= {"row": row.name, "warmup": run.warmup, "profiled": run.profiled}
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if status:
        print(f"{path.stem}: mkor overhead ended with {status}", file=sys.stderr)
    return status == 0


def stored(row: Row, run: Run, path: Path) -> Record | None:
    """What a file holds, if that is of this subject and these contestants."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        model = {"name": row.model, "sizes": dict(row.sizes)}
        labels = [each["contestant"] for each in record["timings"]]
        fits = record["model"] == model and labels == list(run.contestants)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if fits else None


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes else "less than a minute"


def measure_all(rows: Sequence[Row], folder: Path, *, resume: bool, quiet: bool) -> bool:
    """All runs that are not there yet; False if one failed."""
    todo, well = [(row, *each) for row in rows for each in row.files()], True
    if resume:
        there = [file for row, run, file in todo if stored(row, run, folder / file)]
        for file in there:
            print(f"{file} is there already", file=sys.stderr)
        todo = [each for each in todo if each[2] not in there]
    began, done, ahead = time.perf_counter(), 0.0, sum(run.seconds for _, run, _ in todo)
    for index, (row, run, file) in enumerate(todo):
        pace = (time.perf_counter() - began) / done if done else 1.0
        print(
            f"[{index + 1}/{len(todo)}] {row.title}; {len(run.contestants)} contestants, "
            f"{run.rounds} rounds; {clock(pace * ahead)} left",
            file=sys.stderr,
            flush=True,
        )
        if measure(row, run, folder / file, quiet=quiet):
            print(told(row, json.loads((folder / file).read_text(encoding="utf-8"))), flush=True)
        else:
            well = False
        done, ahead = done + run.seconds, ahead - run.seconds
    return well


def told(row: Row, record: Record) -> str:
    """A line about a run."""
    found = ", ".join(f"{each['contestant']} {each['ratio']:.3f}" for each in record["timings"][1:])
    slow = quietness(record)
    busy = f" (busy: wall over CPU time {slow:.2f})" if slow > BUSY else ""
    return f"{row.name}: {found}{busy}"


def quietness(record: Record) -> float:
    """The base's wall time over its CPU time."""
    base = record["timings"][0]
    return float(base["wall_ms"] / base["cpu_ms"])


# ------------------------------------------------------------------------------- what came of it


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


# --------------------------------------------------------------------------------------- the page


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, text: str = ".3f") -> str:
    return "" if value is None else format(value, text)


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(value: float | None, most: float) -> str:
    if value is None:
        return NOT_MEASURED
    return "met" if value <= most else "**not met**"


def exact(value: float, most: float, percent: bool) -> str:
    """So many digits that a figure just above its bar does not look like it."""
    for digits in range(1 if percent else 3, 7):
        text = format(value, f".{digits}{'%' if percent else 'f'}")
        limit = format(most, f".{digits}{'%' if percent else 'f'}")
        if text != limit or value <= most:
            break
    return text


def subject_of(bar: Bar) -> str:
    row = ROWS[bar.row]
    return f"{WHAT[bar.figure]}, {row.title}"


def bar_rows(everything: Sequence[Costs]) -> list[tuple[str, ...]]:
    """What, who, bar, floor, measured, verdict."""
    rows = []
    for bar in BARS:
        value, found = value_of(bar, everything)
        percent = bar.figure == "extra_memory"
        shown = "" if value is None else exact(value, bar.most, percent)
        if found and not percent:
            shown += f" ({found.timing['low']:.3f}-{found.timing['high']:.3f})"
        limit = f"{bar.most:.1%}" if percent else f"{bar.most:g}"
        floor = number(bar.floor, "g")
        rows.append(
            (subject_of(bar), f"`{bar.contestant}`", limit, floor, shown, verdict(value, bar.most))
        )
    return [*rows, cheapest_row(everything)]


def cheapest_row(everything: Sequence[Costs]) -> tuple[str, ...]:
    """MKOR against those that update at every step, over all rows."""
    found = {costs.row.name: is_cheapest(costs) for costs in everything if len(costs.records) > 1}
    lost = [name for name, cheapest in found.items() if cheapest is False]
    unknown = [name for name, cheapest in found.items() if cheapest is None]
    shown = f"in {sum(map(bool, found.values()))} of {len(found)} rows"
    shown += f"; not in {', '.join(lost)}" if lost else ""
    shown += f"; {NOT_MEASURED}: {', '.join(unknown)}" if unknown else ""
    told = "**not met**" if lost else NOT_MEASURED if unknown else "met"
    who = f"cheaper than {', '.join(EVERY_STEP)} at every step"
    return (who, f"`{MKOR}`", "every row", "", shown, told)


def show(everything: Sequence[Costs], stream: TextIO) -> None:
    """The bars, briefly."""
    *bars, all_rows = [[re.sub("[`*]", "", cell) for cell in row] for row in bar_rows(everything)]
    lines = [(bar.row, *cells[1:]) for bar, cells in zip(BARS, bars, strict=True)]
    print_table(("row", "who", "bar", "arithmetic", "measured", ""), lines, stream)
    print(f"\n{all_rows[1]} {all_rows[0]}: {all_rows[4]}: {all_rows[5]}", file=stream)


def rivals_table(everything: Sequence[Costs]) -> str:
    """The comparisons, each within the run with everyone."""
    rows = []
    for costs in everything:
        if len(costs.records) < 2:
            continue
        beside, eva = costs.beside, against_eva(costs)
        cheapest = {True: "yes", False: "**no**", None: NOT_MEASURED}[is_cheapest(costs)]
        rows.append(
            (
                costs.row.name,
                number(ratio_in(beside, MKOR)),
                *(number(ratio_in(beside, label)) for label in EVERY_STEP.values()),
                cheapest,
                *(number(ratio_in(beside, label)) for label in RARELY.values()),
                number(ratio_in(beside, EVA)),
                f"{eva[1]:.3f} ({eva[0]:.3f}-{eva[2]:.3f})" if eva else "",
            )
        )
    headers = ("row", "MKOR", *EVERY_STEP, "MKOR is cheaper", *RARELY, "Eva", "MKOR over Eva")
    return table(headers, rows)


def costs_table(costs: Costs) -> str:
    """All contestants of a row."""
    rows = []
    for label, found in costs.found.items():
        timing_, counts = found.timing, found.timing["counts"]
        measured = not found.source
        mean = "" if found.cycle == 1 else number(found.ratio) or "not seen"
        quarter = f" ({timing_['low']:.3f}-{timing_['high']:.3f})" if label != BASE else ""
        rows.append(
            (
                f"`{label}`" if measured else f"`{label}`, computed",
                str(found.record["rounds"]) if measured else "",
                milliseconds(timing_["cpu_ms"]) if measured else "",
                f"{timing_['ratio']:.3f}{quarter}" if measured else "",
                mean if found.cycle > 1 or measured else number(found.ratio),
                number(timing_["wall_ratio"]) if measured else "",
                bytes_text(timing_["state_bytes"]),
                f"{timing_['extra_memory']:.2%}",
                bytes_text(counts["peak_bytes"]) if measured else "",
                f"{counts['operators']:,.0f}" if measured else "",
                f"{counts['allocations']:,.0f}" if measured else "",
            )
        )
    headers = (
        "contestant", "rounds", "CPU ms", "ratio (quartiles)", "over a cycle", "wall ratio",
        "state", "extra memory", "peak memory", "calls", "allocations",
    )  # fmt: skip
    return table(headers, rows)


def limits_text(record: Record) -> str:
    """The bounds of MKOR's parts beside what was measured."""
    rows = [
        (
            limit["part"].removeprefix("mkor."),
            bytes_text(limit["bytes"]),
            f"{limit['bytes_ms']:.3g}",
            f"{1e-6 * limit['operations']:.3g}" if limit["operations"] else "",
            f"{limit['operations_ms']:.3g}" if limit["operations"] else "",
            f"{limit['calls']:.0f}",
            f"{limit['calls_ms']:.3g}",
            f"{limit['measured_ms']:.3g}",
            f"{limit['near']:.0%}",
        )
        for limit in record["limits"][MKOR]
    ]
    headers = ("part", "moves", "ms", "Mflop", "ms", "calls", "ms", "measured ms", "near")
    machine = record["machine"]
    speeds = [1e-9 * speed for speed in machine["bandwidth"].values()]
    return (
        f"Limits of `{MKOR}`:\n\n{table(headers, rows)}\n\n"
        f"Bytes at {min(speeds):.3g} to {max(speeds):.3g} GB/s by size, operations at "
        f"{1e-9 * machine['operations']:.3g} Gflop/s, calls at {1e6 * machine['call']:.2g} us."
    )


def section(costs: Costs) -> str:
    """A row of the page."""
    parts = [f"### {costs.row.name}", f"{costs.row.title}."]
    if costs.missing:
        parts.append(f"**{NOT_MEASURED.capitalize()}**: {', '.join(costs.missing)}.")
    if costs.found:
        parts.append(costs_table(costs))
    told = [
        f"`mkor overhead {quoted(overhead_words(costs.row, replace(run, rounds=rounds_of(r))))}`: "
        f"profiled iterations {r.get('profiled', Worker.profiled_rounds)}; AdamW's wall time over "
        f"its CPU time {quietness(r):.2f}"
        for run, r in zip(costs.row.runs, costs.records, strict=True)
        if r
    ]
    again = costs.beside.get(MKOR)
    if again and costs.records[0]:
        low, high = again.timing["low"], again.timing["high"]
        told[-1] += f"; there `{MKOR}` took {again.ratio:.3f} ({low:.3f}-{high:.3f})"
    parts.append("\n".join(f"- {line}" for line in told))
    first = costs.records[0]
    if first and MKOR in first.get("limits", {}):
        parts.append(limits_text(first))
    return "\n\n".join(filter(None, parts))


def rounds_of(record: Record) -> int:
    return int(record["rounds"])


def quoted(words: Sequence[str]) -> str:
    return " ".join(f"'{word}'" if re.search(r"[\[,]", word) else word for word in words)


def environments(everything: Sequence[Costs]) -> list[str]:
    """Where the figures come from, each place once, with its dates."""
    dates: dict[str, set[str]] = {}
    for costs in everything:
        for record in filter(None, costs.records):
            place = record["environment"]
            packages = place["packages"]
            versions = ", ".join(f"{each} {packages[each]}" for each in packages if packages[each])
            text = (
                f"{place['cpu']}, {place['cores']} cores, {place['threads']} thread(s) in use, "
                f"{place['platform']}; Python {place['python']}, {versions}"
            )
            dates.setdefault(text, set()).add(place["date"])
    return [f"{text}; {', '.join(sorted(days))}" for text, days in dates.items()]


EXPLANATION = f"""CPU time of whole training iterations over AdamW's in the same round: the median
of the rounds (quartiles). *Over a cycle*: the average for those who do some of their work only
every so many steps, made of the medians of the rounds with that work and of those without it;
*computed* contestants were not run, they are other weights of the same two medians. SOAP decomposes
every {SOAP_PERIOD} steps, as it does by default, and is compared so; *SOAP at every step* would do
so in each. *Extra memory*: state beyond
AdamW's over weights, gradients and AdamW's state. *Peak memory*: activations, gradients and
temporaries of an iteration. *Calls*: of operators, from Python and the backward pass; the
package's own kernels are not among them;
*allocations*: pieces of memory taken; both in the profiled iterations, which may be none of those
with rare work. *Near*: the larger bound, of bytes or operations, over the measured time. The bars
are about each row's first run, of AdamW and MKOR over it alone; comparisons are made within the
second."""


def page(everything: Sequence[Costs], command: str, *, tiny: bool) -> str:
    parts = ["# What MKOR costs", f"Made by `{command}` from the JSON files beside it."]
    if tiny:
        parts.append("**A trial at tiny sizes: none of these figures means anything.**")
    parts += [f"On {text}." for text in environments(everything)]
    parts.append("![Ratios of CPU time, by row](costs.png)")
    headers = ("what", "who", "bar", "arithmetic alone", "measured", "")
    parts += ["## The bars", table(headers, bar_rows(everything))]
    missing = [file for costs in everything for file in costs.missing]
    if missing:
        parts.append(f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}.")
    parts += ["## Against the others", rivals_table(everything)]
    parts += ["## How to read it", EXPLANATION, "## By row", *map(section, everything)]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------ the picture

COLUMNS, PANEL_WIDTH, LANE, TOP, BOTTOM = 5, 2.3, 0.19, 0.5, 0.55
LEFT, GAP, HEAD, FOOT = 1.75, 0.3, 0.5, 0.35
GOOD, BAD, FAINT = "#00705A", "#B00020", "#EEEEEE"
ROOM = 1.55
"""By how much the axis goes on behind the largest ratio, for its text."""


def draw_lane(axes: Axes, lane: int, label: str, found: Found, bar: Bar | None) -> None:
    """A contestant: dot, whiskers, the figure, and the bar if there is one."""
    _, colour, always = LOOKS[label]
    ratio = found.ratio
    if ratio is None:
        return
    low, high = (ratio, ratio) if found.source else found.whiskers
    axes.plot([low, high], [lane, lane], color=colour, lw=1.4, zorder=2, solid_capstyle="butt")
    face = colour if always else "white"
    axes.plot([ratio], [lane], "o", color=colour, mfc=face, ms=4.8, zorder=3)
    text, ink, weight = f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}", GREY, "normal"
    if bar:
        for ends in ((-0.55, -0.2), (0.2, 0.55)):
            axes.plot([bar.most] * 2, [lane + end for end in ends], color="black", lw=1.6, zorder=4)
        met = ratio <= bar.most
        text = f"{exact(ratio, bar.most, percent=False)} {'≤' if met else '>'} {bar.most:g}"
        ink, weight = (GOOD if met else BAD), "bold"
    right = max(high, ratio, bar.most if bar else 0.0)
    how: Record = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}
    axes.annotate(text, (right, lane), (5, -0.5), color=ink, fontweight=weight, **how)


def draw_panel(axes: Axes, costs: Costs, lanes: Mapping[str, int]) -> None:
    """A row's contestants, one below the other."""
    found = costs.found
    # A bar is about the first run only.
    bars = {b.contestant: b for b in BARS if b.row == costs.row.name and costs.records[0]}
    for label, lane in lanes.items():
        axes.axhline(lane, color=FAINT, lw=0.7, zorder=0)
        if label in found:
            draw_lane(axes, lane, label, found[label], bars.get(label))
    axes.axvline(1.0, color=GREY, lw=0.9, ls=(0, (2, 3)), zorder=1)
    if not found:
        middle: Record = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, NOT_MEASURED, color=GREY, fontsize=9, **middle)
    sizes = ", ".join(f"{key} {size:,}" for key, size in costs.row.sizes.items())
    axes.set_title(costs.row.model, fontsize=9.5, fontweight="bold", loc="left", pad=14)
    axes.text(0, 1.02, sizes, fontsize=7.5, color=GREY, transform=axes.transAxes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", length=3, color="#999999", labelsize=8)


def limits_of(everything: Sequence[Costs]) -> tuple[float, float]:
    """The axis that all panels share."""
    shown = [
        value
        for costs in everything
        for label, found in costs.found.items()
        if label in LOOKS and found.ratio is not None
        for value in (found.ratio, *(() if found.source else found.whiskers))
    ]
    return min([0.9, *(0.97 * value for value in shown)]), ROOM * max([1.5, *shown])


def draw(everything: Sequence[Costs], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    panels = [costs for costs in everything if costs.row.drawn]
    lanes = {label: index for index, label in enumerate(LOOKS)}
    low, high = limits_of(panels)
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    ticks = [tick for tick in ticks if tick != 1.5 or high < 8]
    lines, tall = -(-len(panels) // COLUMNS), LANE * (len(lanes) + 0.6)
    width = LEFT + COLUMNS * (PANEL_WIDTH + GAP)
    height = TOP + lines * (HEAD + tall + FOOT) + BOTTOM
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    for index, costs in enumerate(panels):
        line, column = divmod(index, COLUMNS)
        left = LEFT + column * (PANEL_WIDTH + GAP)
        bottom = height - TOP - line * (HEAD + tall + FOOT) - HEAD - tall
        place = (left / width, bottom / height, PANEL_WIDTH / width, tall / height)
        axes = figure.add_axes(place)
        axes.set_xscale("log")
        draw_panel(axes, costs, lanes)
        axes.set_xlim(low, high)
        axes.set_ylim(len(lanes) - 0.4, -0.8)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks(list(lanes.values()), [LOOKS[label][0] for label in lanes])
        for text, label in zip(axes.get_yticklabels(), lanes, strict=True):
            text.set_color(LOOKS[label][1])
        axes.tick_params(labelleft=column == 0)
    title = "CPU time of a training iteration over AdamW's"
    figure.text(0.1 / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold")
    note = (
        "median and quartiles of the rounds; hollow: works only every 10 or 50 steps, average over "
        "a cycle, with a line from the steps without that work to those with it;\n"
        "black: the most that it may be"
    )
    figure.text(0.1 / width, 0.12 / height, note, fontsize=8, color=GREY, linespacing=1.4)
    figure.savefig(path)


# ------------------------------------------------------------------------------- the command line


def command_of(out: str, *, tiny: bool) -> str:
    """The command that measures everything; runs have their rounds beside them."""
    place = Path(out)
    named = place.as_posix() if not place.is_absolute() and ".." not in place.parts else "FOLDER"
    return f"python benchmarks/costs.py --out {named}" + (" --tiny" if tiny else "")


def costs(arguments: argparse.Namespace) -> int:
    wanted = arguments.rows or [row.name for row in ALL if not row.asked_for]
    for name in wanted:
        if name not in ROWS:
            raise UnknownNameError("row", name, ROWS)
    folder = prepare_folder(arguments.out)
    assert folder is not None
    rows = {name: planned(row, arguments) for name, row in ROWS.items()}
    status = 0
    if not arguments.page_only:
        chosen = [row for name, row in rows.items() if name in wanted]
        try:
            well = measure_all(chosen, folder, resume=arguments.resume, quiet=arguments.quiet)
        except KeyboardInterrupt:
            print("interrupted; the page is made of what is there", file=sys.stderr)
            status = INTERRUPTED
        else:
            status = int(not well)
    everything = read_all(rows.values(), folder)
    text = page(everything, command_of(arguments.out, tiny=arguments.tiny), tiny=arguments.tiny)
    (folder / "costs.md").write_text(text, encoding="utf-8")
    draw(everything, folder / "costs.png")
    show(everything, sys.stdout)
    print(f"written: {folder / 'costs.md'}, {folder / 'costs.png'}")
    return status


def make_parser() -> argparse.ArgumentParser:
    known = ", ".join(f"{row.name}{' (only if named)' if row.asked_for else ''}" for row in ALL)
    parser = argparse.ArgumentParser(prog="costs", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="the folder of files, page and picture")
    add("--rows", type=names, default=[], metavar="A,B", help=f"only these: {known}")
    add("--rounds", type=whole(1), metavar="N", help="rounds of every run (by row)")
    add("--resume", action="store_true", help="keep the runs that are in the folder already")
    add("--page-only", action="store_true", help="measure nothing; page and picture from files")
    add("--tiny", action="store_true", help="tiny sizes and 2 rounds, to see whether it works")
    add("--quiet", action="store_true", help="no progress within a run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == RUN:
        return run_here(words[1:])
    arguments = make_parser().parse_args(words)
    # Else a run would go on when this is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return costs(arguments)
    except UsageError as error:
        print(f"costs: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
