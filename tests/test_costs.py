"""``benchmarks/costs.py``: what it runs, keeps, says and draws; no time is asserted."""

import contextlib
import importlib.util
import io
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mkor.bench.contestants import parse_contestant
from mkor.bench.optimizers import base_defaults, check_names
from mkor.bench.overhead_models import MODELS, model_subject
from mkor.bench.timing import Worker

FILE = Path(__file__).parent.parent / "benchmarks" / "costs.py"
STEPS = (-0.03, 0.02, 0.0, 0.03, -0.02)
"""By how much the rounds of hand-made files differ, in their order; quartiles are the second."""
LOW, HIGH = -0.02, 0.02

Record = dict[str, Any]
Ratio = float | tuple[float, float]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("costs", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules["costs"] = module
    spec.loader.exec_module(module)
    return module


costs = load()


# ------------------------------------------------------------------------------ hand-made files


def timing_of(label: str, ratio: Ratio, rounds: int, warmup: int, extra: float) -> Record:
    """A contestant that takes so many times a second; of two ratios the second is the rare one."""
    usual, rare = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    noise = itertools.cycle(STEPS if label != "adamw" else (0.0,))
    samples = [
        (rare if (warmup + index) % 10 == 0 else usual) + next(noise) for index in range(rounds)
    ]
    return {
        "contestant": label,
        "cpu_ms": 1e3 * usual,
        "wall_ms": 1.01e3 * usual,
        "ratio": statistics.median(samples),
        "low": usual + LOW if label != "adamw" else 1.0,
        "high": usual + HIGH if label != "adamw" else 1.0,
        "mean_ratio": statistics.fmean(samples),
        "wall_ratio": usual,
        "state_bytes": 2_500_000,
        "extra_memory": extra,
        "parts_ms": {"step": 1.0},
        "cpu_samples": samples,
        "wall_samples": samples,
        "parts_wall_ms": {"step": 1.0},
        "page_faults": 0,
        "counts": {
            "operators": 1234.0,
            "operators_in": {},
            "kernels": 0.0,
            "allocations": 567.0,
            "allocated_bytes": 8e6,
            "peak_bytes": 7e6,
            "slowest": [],
        },
    }


LIMIT = {
    "part": "mkor.update",
    "bytes": 3000.0,
    "operations": 5e6,
    "calls": 12.0,
    "bytes_ms": 0.25,
    "operations_ms": 0.125,
    "calls_ms": 0.05,
    "measured_ms": 0.5,
    "near": 0.5,
}


def write(
    folder: Path,
    name: str,
    ratio: Mapping[str, Ratio],
    *,
    memory: Mapping[str, float] | None = None,
    rounds: int = 10,
    runs: Sequence[int] = (0, 1),
    cpu: str = "a processor",
) -> None:
    """The files of a row as `mkor overhead` writes them; 1.5 for those who are not named."""
    row = costs.ROWS[name]
    for index, (run, file) in enumerate(row.files()):
        if index not in runs:
            continue
        timings = [
            timing_of(
                label,
                1.0 if label == "adamw" else ratio.get(label, 1.5),
                rounds,
                run.warmup,
                (memory or {}).get(label, 0.0),
            )
            for label in run.contestants
        ]
        record = {
            "format": 1,
            "model": {"name": row.model, "sizes": row.sizes},
            "rounds": rounds,
            "device": "cpu",
            "autocast": None,
            "memory_kept": True,
            "environment": {
                "date": "2030-01-02",
                "python": "3.99",
                "packages": {"mkor": "0.1.0", "torch": "2.99", "numpy": None},
                "platform": "Linux x86_64",
                "cpu": cpu,
                "cores": 2,
                "threads": 1,
            },
            "timings": timings,
            "machine": {"bandwidth": {"65536": 5e10, "1": 1e10}, "operations": 1e11, "call": 1e-6},
            "limits": {"mkor+adamw": [LIMIT]} if run.limits else {},
            "warmup": run.warmup,
            "profiled": run.profiled,
        }
        (folder / file).write_text(json.dumps(record))
