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

What is measured is in `costs_rows.py`, how in `costs_runs.py`, what comes of it in
`costs_figures.py`, and what is shown in `costs_page.py` and `costs_picture.py`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from costs_figures import read_all
from costs_page import page, show
from costs_picture import draw
from costs_rows import ALL, ROWS, planned
from costs_runs import measure_all

from mkor.bench.arguments import names, whole
from mkor.bench.compare import INTERRUPTED
from mkor.bench.errors import UnknownNameError, UsageError
from mkor.bench.places import prepare_folder


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
    arguments = make_parser().parse_args(argv)
    # Else a run would go on when this is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return costs(arguments)
    except UsageError as error:
        print(f"costs: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
