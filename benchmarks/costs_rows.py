"""What `costs.py` measures: contestants, subjects and bars."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mkor.bench.curves import COLOURS, lighter

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
    mlp(512, 4096, bars_run(120, 80), others(MLPS_OWN, 10, 90)),
    mlp(1024, 4096, bars_run(40, 120), others(MLPS_OWN, 6, 230, profiled=1)),
    mlp(256, 4096, bars_run(240, 55), others(MLPS_OWN, 20, 46)),
    mlp(512, 1024, bars_run(240, 50), others(MLPS_OWN, 20, 48)),
    mlp(
        64,
        64,
        bars_run(200, 12, SMALL),
        others([each for each in MLPS_OWN if each != SMALL], 200, 30, profiled=10),
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
