"""The table of docs/performance.md: what a step with MKOR costs over AdamW's, row by row.

    python benchmarks/costs.py --out costs.json
    python benchmarks/costs.py --rows mlp-64-64,conv-net --against ../older-checkout

Every row is measured in a process of its own, one thread, statistics at every step. With --against
the row is measured in two such processes in turn, one with the package of this checkout and one
with that of the other, both with this checkout's `mkor.bench`: a turn here, a turn there. What
slows a turn slows both contestants of it, so each turn gives a ratio over AdamW's, and each pair
of turns a ratio of the two ratios, of which median and quartiles are shown. Older checkouts are
measured without their compiled kernels (MKOR_NATIVE=0).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
PLAIN = {"MKOR_NATIVE": "0"}
PAIR, RANKS = "adamw,mkor+adamw", "adamw,mkor+adamw,mkor[rank=16]+adamw"
TINY = {"width": 16, "depth": 2, "rows": 32, "batch": 2, "context": 8}


class Row(NamedTuple):
    """A model with its sizes, who trains it, and how many steps of each make a turn."""

    model: str
    sizes: dict[str, int]
    steps: int
    contestants: str = PAIR


def mlp(width: int, rows: int, steps: int, depth: int = 4, contestants: str = PAIR) -> Row:
    return Row("mlp", {"width": width, "depth": depth, "rows": rows}, steps, contestants)


def transformer(width: int, depth: int, batch: int, steps: int) -> Row:
    sizes = {"width": width, "depth": depth, "batch": batch, "context": 256}
    return Row("transformer", sizes, steps)


ROWS = {
    "mlp-512-4096": mlp(512, 4096, 5),
    "mlp-1024-4096": mlp(1024, 4096, 3),
    "mlp-256-4096": mlp(256, 4096, 12),
    "mlp-512-1024": mlp(512, 1024, 12),
    "mlp-64-64": mlp(64, 64, 60, depth=16, contestants=RANKS),
    "conv-net": Row("conv-net", {"width": 16, "depth": 3, "batch": 64}, 5),
    "bert-base-block": Row("bert-base-block", {"depth": 1, "batch": 4, "context": 512}, 2),
    "transformer-256": transformer(256, 2, 8, 4),
    "transformer-1024": transformer(1024, 1, 4, 2),
    "transformer-2048": transformer(2048, 1, 4, 1),
}


# ---------------------------------------------------------------------------- a measuring process


def serve(row: Row) -> None:
    """Answers every line "turn" with the ratios of a turn, and "end" with all figures, as JSON."""
    import mkor

    # This checkout's bench around whichever package is imported.
    folder = HERE / "src" / "mkor" / "bench"
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "mkor.bench", init, submodule_search_locations=[str(folder)]
    )
    mkor.bench = sys.modules["mkor.bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mkor.bench)
    import torch

    from mkor.bench import overhead
    from mkor.bench.contestants import parse_contestants
    from mkor.bench.models import model_subject
    from mkor.bench.results import plain

    torch.set_num_threads(1)
    kept = overhead.keep_memory()
    subject = model_subject(row.model, row.sizes)
    workers = overhead.prepare(parse_contestants(row.contestants), subject)
    for line in sys.stdin:
        if line.strip() != "turn":
            break
        overhead.take_turns(workers, row.steps)
        base, *others = ([m[-1][0] - m[0][0] for m in w.marks[-row.steps :]] for w in workers)
        ratios = [statistics.median(map(float.__truediv__, own, base)) for own in others]
        print(json.dumps(ratios), flush=True)
    timings = overhead.examine(workers, steps=min(overhead.EXAMINED, row.steps))
    report = plain(overhead.report_of(timings, subject, kept))
    print(json.dumps(report | {"package": str(Path(mkor.__file__).parent)}), flush=True)


class Measuring:
    """A process that measures a row with the package of a checkout."""

    def __init__(self, name: str, checkout: Path, tiny: bool) -> None:
        self.package = checkout / "src" / "mkor"
        if not (self.package / "__init__.py").is_file():
            raise SystemExit(f"{checkout} is no checkout: it has no src/mkor.")
        command = [sys.executable, __file__, "--serve", name, *(["--tiny"] if tiny else [])]
        self.process = subprocess.Popen(
            command,
            env=os.environ | QUIET | PLAIN | {"PYTHONPATH": str(self.package.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.turns: list[list[float]] = []

    def ask(self, what: str):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a measuring process ended before its time; see above.")
        return json.loads(answer)

    def turn(self) -> None:
        self.turns.append(self.ask("turn"))

    def end(self) -> dict:
        report = self.ask("end")
        if Path(report.pop("package")) != self.package:
            raise SystemExit(f"another package than that of {self.package} was measured.")
        return report | {"turns": self.turns}


# ---------------------------------------------------------------------------------------- the whole


def measure(name: str, checkouts: list[Path], turns: int, tiny: bool) -> list[dict]:
    """A row's reports, one for each checkout, with the ratios of their turns."""
    processes: list[Measuring] = []
    try:
        processes += [Measuring(name, checkout, tiny) for checkout in checkouts]
        for index in range(turns):
            # Whoever comes first changes.
            for process in processes if index % 2 else reversed(processes):
                process.turn()
        return [process.end() for process in processes]
    finally:
        for process in processes:
            process.process.kill()
            process.process.communicate()


def quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def lines(name: str, reports: list[dict]) -> list[str]:
    """Lines of the Markdown table, one for each contestant but AdamW."""
    found = []
    for index, timing in enumerate(reports[0]["timings"][1:]):
        cells = [name, f"`{timing['contestant']}`"]
        for report in reports:
            own = report["timings"][1 + index]
            ratios = [turn[index] for turn in report["turns"]]
            cells += [quartiles(ratios), f"{own['layer_calls']:.1f}", f"{own['waits']:.1f}"]
        cells.append(f"{timing['extra_memory']:.2%}")
        if len(reports) > 1:
            pairs = zip(*(report["turns"] for report in reports), strict=True)
            cells.append(quartiles([here[index] / there[index] for here, there in pairs]))
        found.append(f"| {' | '.join(cells)} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--rows", help=f"only these: {','.join(ROWS)}")
    add("--against", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    add("--turns", type=int, default=12, help="turns of each row and checkout (12)")
    add("--out", type=Path, metavar="FILE", help="a JSON file for all figures")
    add("--tiny", action="store_true", help="tiny sizes, to see whether it works")
    add("--serve", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = arguments.rows.split(",") if arguments.rows else list(ROWS)
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    if arguments.tiny:
        for name, row in ROWS.items():
            ROWS[name] = row._replace(steps=2, sizes={key: TINY[key] for key in row.sizes})
    if arguments.serve:
        serve(ROWS[arguments.serve])
        return
    checkouts = [HERE, *([arguments.against.resolve()] if arguments.against else [])]
    figures = ["time over AdamW's (quartiles)", "calls per layer", "host waits"]
    headers = ["row", "contestant", *figures, "extra memory"]
    if arguments.against:
        headers[-1:] = [*(f"{figure}, other" for figure in figures), headers[-1], "here over other"]
    print(f"| {' | '.join(headers)} |\n|{' --- |' * len(headers)}", flush=True)
    record = {}
    for name in rows:
        record[name] = measure(name, checkouts, arguments.turns, arguments.tiny)
        print("\n".join(lines(name, record[name])), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
