"""How the cost of one layer's curvature grows with its width.

Trains one square layer between a narrow input and a narrow output with each kind of factor, on few
rows, and profiles update and preconditioning apart (so without capture). Prints milliseconds, the
exponent of the width by least squares from 512 up, and the numbers sent per update.

    python benchmarks/scaling.py --out scaling.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mkor.bench import overhead
from mkor.bench.bytes_sent import formula
from mkor.bench.contestants import parse_contestant
from mkor.bench.models import Worker, model_subject
from mkor.bench.results import FORMAT, environment, write_record
from mkor.bench.show import print_table

WIDTHS = (128, 256, 512, 1024, 2048, 4096)
FIT_FROM, ROWS = 512, 512
METHODS = {
    "window": "mkor+sgd",
    "dense, paper": "dense-mkor[paper,update_every=1]+sgd",
    "KFAC": "kfac[inverse_every=1]+sgd",
    "KFAC, no inverse": "kfac[inverse_every=1000000]+sgd",
    "Eva": "eva+sgd",
}
PARTS = ("mkor.update", "mkor.precondition")


def exponent(widths: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of log value against log width from `FIT_FROM` up."""
    pairs = zip(widths, values, strict=True)
    points = [(math.log(w), math.log(v)) for w, v in pairs if w >= FIT_FROM and v > 0]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if points[1:] else None


def measure(text: str, width: int, steps: int) -> dict[str, float]:
    """CPU milliseconds of a layer's parts, and the numbers it sends."""
    contestant = parse_contestant(text)
    # The second hidden layer is square like the first; their parts take the same.
    worker = Worker(contestant, model_subject("mlp", {"width": width, "depth": 2, "rows": ROWS}))
    worker.warm_up()
    layers = worker.layers()
    ms = overhead.profile(worker, steps).parts_ms
    found = {part: ms[part] / len(layers) for part in PARTS}
    sent = sum(formula(contestant, layers[:1], 1).values())
    return {**found, "both": sum(found.values()), "numbers sent": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="rising")
    parser.add_argument("--steps", type=int, default=10, help="profiled steps at each width (10)")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    widths = [int(width) for width in arguments.widths.split(",")]
    curves, rows = [], []
    for method, text in METHODS.items():
        found = [measure(text, width, arguments.steps) for width in widths]
        for part in found[0]:
            values = [each[part] for each in found]
            slope = exponent(widths, values)
            curves.append({"method": method, "part": part, "values": values, "exponent": slope})
            cells = (f"{value:,.4g}" for value in values)
            shown = "" if slope is None else f"{slope:.2f}"
            rows.append((f"{method}: {part.removeprefix('mkor.')}", *cells, shown))
    print_table(("CPU ms at width", *map(str, widths), "exponent"), rows, sys.stdout)
    if arguments.out:
        record = {"format": FORMAT, "environment": environment(), "widths": widths}
        write_record(record | {"fit_from": FIT_FROM, "curves": curves}, arguments.out)


if __name__ == "__main__":
    main()
