"""What docs/performance.md says of the kernels: each for every kind of processor, and torch's.

    python benchmarks/kernels.py --out docs/results

One thread, everything in turn, medians and quartiles of wall time. It takes a few seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from processor import Times, Work, in_turn, microseconds, nothing
from torch import nn

from mkor import linalg, native
from mkor.bench.arguments import whole
from mkor.bench.errors import UsageError
from mkor.bench.files import FORMAT, write_record
from mkor.bench.machine import environment
from mkor.bench.places import prepare_folder
from mkor.bench.tables import print_table
from mkor.curvature.contract import BatchShape, Statistics
from mkor.curvature.window import Window
from mkor.layers.kinds import describe
from mkor.layers.sums import Pick

TORCH = "torch"
"""Its operators, in the place of a version."""


def works(width: int) -> dict[str, Work]:
    """What has a kernel and takes long, at the defaults: windows of 64, 16 vectors of 32 rows."""
    window, pick = Window(), Pick(16, 32, 0)
    k, r = window.vectors, window.rank
    rows = describe(nn.Linear(width, width))[0].kind
    patches = describe(nn.Conv2d(width // 16, 4, 3, padding=1))[0].kind
    x, images = torch.randn(2 * width, width), torch.randn(64, width // 16, 16, 16)
    W, b = torch.randn(1, width, width), torch.randn(1, width)
    V = torch.randn(1, r, width)
    roots = [(V @ V.mT, torch.rand(1, r), torch.ones(1))]
    sides, device = ("left", "right"), torch.device("cpu")
    state = window.init(BatchShape(1, width, width, False, sides, torch.float32, device))
    statistics = Statistics(
        {side: torch.randn(1, k, width) for side in sides},
        {side: torch.ones(1) for side in sides},
        torch.ones(1, k, dtype=torch.bool),
        torch.ones(1, dtype=torch.bool),
        0,
        whole=True,
    )
    return {
        f"sums of rows of {2 * width} x {width}": partial(rows.input_sums, x, pick),
        f"sums of 3 x 3 patches of 64 x {width // 16} x 16 x 16": partial(
            patches.input_sums, images, pick
        ),
        f"both windows of {width} take {k} vectors": partial(window.update, state, statistics),
        f"A of a window of {r}": lambda: list(linalg.whitening_roots(roots, [True], 0.02)),
        f"norm of {width} x {width} and a bias": partial(linalg.joint_norm, W, b),
    }


def versions() -> list[str]:
    """What this processor can run, best first, and torch's operators."""
    return [*(native.loading.kernels().versions() if native.in_use() else []), TORCH]


def run_as(version: str, work: Work) -> None:
    """Run something with one version."""
    if version == TORCH:
        with mock.patch("mkor.native.loading._kernels", None):
            work()
        return
    kernels = native.loading.kernels()
    before = kernels.version()
    kernels.use(version)
    try:
        work()
    finally:
        kernels.use(before)


def measured(width: int, rounds: int) -> dict[str, Times]:
    """Quartiles of seconds, by work and version."""
    found = {}
    for name, work in works(width).items():
        pairs: dict[str, tuple[Work, Work]] = {
            version: (nothing, partial(run_as, version, work)) for version in versions()
        }
        found[name] = in_turn(pairs, rounds)
    return found


def show(kernels: Mapping[str, Times]) -> None:
    """A table."""
    heads = list(next(iter(kernels.values())))
    rows = [
        [name, *(microseconds(times[head]) for head in heads)] for name, times in kernels.items()
    ]
    print_table(["us", *heads], rows, sys.stdout)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="kernels.json")
    parser.add_argument("--rounds", type=whole(3), default=300, metavar="N")
    parser.add_argument("--width", type=whole(16), default=512, metavar="N")
    arguments = parser.parse_args(words)
    try:
        out = prepare_folder(arguments.out)
    except UsageError as error:
        parser.error(str(error))
    assert out is not None
    path = out / "kernels.json"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "format": FORMAT,
        "environment": environment(),
        "width": arguments.width,
        "rounds": arguments.rounds,
        "kernels": measured(arguments.width, arguments.rounds),
    }
    write_record(record, path)
    show(record["kernels"])
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
