"""How `costs.py` measures: each run in a process of its own, whose file stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from costs_rows import Row, Run

from mkor.bench import cli
from mkor.bench.compare import INTERRUPTED
from mkor.bench.worker import Worker

Record = dict[str, Any]
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
BUSY = 1.05
"""Wall over CPU time from which the machine had other things to do."""


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
    words = [str(run.warmup), str(run.profiled), *words, *(["--quiet"] if quiet else [])]
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


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
