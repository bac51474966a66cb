"""What docs/performance.md says of processors: small operators after large products, and products.

    python benchmarks/processor.py --out docs/results

One thread, everything in turn, medians and quartiles of wall time. It takes about a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mkor.bench.arguments import whole
from mkor.bench.errors import UsageError
from mkor.bench.files import FORMAT, write_record
from mkor.bench.machine import environment
from mkor.bench.memory import keep_memory
from mkor.bench.places import prepare_folder
from mkor.bench.tables import print_table
from mkor.bench.timing import quartiles

Record = dict[str, Any]
Work = Callable[[], object]
Times = dict[str, tuple[float, float, float]]

WIDTH, ROWS = 1024, 4096
WINDOW = 64
WIDTHS = (512, 1024, 2048)
TINY = 32


def seconds(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turn(works: Mapping[str, tuple[Work, Work]], rounds: int) -> Times:
    """Quartiles of each work's seconds; what comes first of a pair is not timed."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 2):
        for name, (before, work) in works.items():
            before()
            found[name].append(seconds(work))
    return {name: quartiles(times[2:]) for name, times in found.items()}


def nothing() -> None:
    """Comes before what follows itself."""


def operators(width: int, rounds: int) -> list[Record]:
    """Operators of a capture or a step, again and again and after a product."""
    x, few = torch.randn(width, width), torch.randn(16, width)
    small = torch.randn(16)
    works: dict[str, Work] = {
        "view of rows": lambda: x.as_strided((4, 4, width), (2 * width, width, 1)),
        "sum of 16 numbers": small.sum,
        "add to 16 numbers": lambda: small.add_(0.0),
        f"add 16 x {width}": lambda: few + few,
        "product of 16 x 16": lambda: torch.mm(few[:, :16], few[:, :16]),
    }
    product = partial(torch.mm, x, x, out=torch.empty_like(x))
    pairs = {f"{name}|loop": (work, work) for name, work in works.items()}
    pairs |= {f"{name}|after": (product, work) for name, work in works.items()}
    times = in_turn(pairs, rounds)
    return [
        {"operator": name, "in_a_loop": times[f"{name}|loop"], "after": times[f"{name}|after"]}
        for name in works
    ]


def products(widths: Sequence[int], rounds: int) -> list[Record]:
    """Operations a second of products with the window's rows, over those of a large product."""
    found = []
    for width in widths:
        weight, rows = torch.randn(width, width), torch.randn(WINDOW, width)
        times = in_turn(
            {
                "window": (nothing, partial(torch.mm, rows, weight)),
                "large": (nothing, partial(torch.mm, weight, weight)),
            },
            rounds,
        )
        speed = WINDOW / width * times["large"][1] / times["window"][1]
        found.append({"width": width, "rows": WINDOW, "speed": speed, "seconds": times})
    return found


def after(rows: int, width: int, rounds: int) -> Times:
    """A large product after small operators of the same thread."""
    x, weight = torch.randn(rows, width), torch.randn(width, width)
    small, out = torch.ones(16), torch.empty(rows, width)

    def product() -> Tensor:
        return torch.mm(x, weight, out=out)

    return in_turn(
        {
            "square().sum()": (lambda: small.square().sum(), product),
            "torch.dot": (lambda: torch.dot(small, small), product),
            "torch.mm": (lambda: torch.mm(small.view(4, 4), small.view(4, 4)), product),
        },
        rounds,
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="processor", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="processor.json")
    parser.add_argument("--rounds", type=whole(3), default=40, metavar="N")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see whether it works")
    arguments = parser.parse_args(words)
    try:
        out = prepare_folder(arguments.out)
    except UsageError as error:
        parser.error(str(error))
    assert out is not None
    path = out / "processor.json"
    torch.set_num_threads(1)
    keep_memory()
    width, rows = (TINY, TINY) if arguments.tiny else (WIDTH, ROWS)
    widths = (TINY,) if arguments.tiny else WIDTHS
    record = {
        "format": FORMAT,
        "environment": environment(),
        "width": width,
        "rows": rows,
        "rounds": arguments.rounds,
        "operators": operators(width, arguments.rounds),
        "products": products(widths, arguments.rounds),
        "product_after": after(rows, width, arguments.rounds),
    }
    write_record(record, path)
    show(record)
    print(f"written: {path}")
    return 0


def microseconds(times: Sequence[float]) -> str:
    """The median of seconds, and the quartiles."""
    low, median, high = (f"{1e6 * time:.1f}" for time in times)
    return f"{median} ({low}-{high})"


def show(record: Mapping[str, Any]) -> None:
    """Three tables."""
    heads = ["operator", "us in a loop", "us after a product"]
    found = record["operators"]
    rows = [
        [each["operator"], *map(microseconds, (each["in_a_loop"], each["after"]))] for each in found
    ]
    print_table(heads, rows, sys.stdout)
    heads = ["width", f"speed of {WINDOW} rows over a large product's"]
    rows = [[str(each["width"]), f"{each['speed']:.2f}"] for each in record["products"]]
    print_table(heads, rows, sys.stdout)
    heads = ["just before a large product", "us of the product"]
    rows = [[name, microseconds(times)] for name, times in record["product_after"].items()]
    print_table(heads, rows, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
