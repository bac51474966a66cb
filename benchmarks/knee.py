"""What rank, vectors, rows and frequency buy: loss against time, one knob at a time.

Races MKOR over AdamW on a task of `mkor compare` with one knob of the window at other values than
its default, beside plain AdamW and the default; everything else stays as it is, learning rates
too. All of a race train step by step in turn on the same batches, so that their times compare:

    .venv/bin/python benchmarks/knee.py --out docs/results
    .venv/bin/python benchmarks/knee.py digits-conv --knob rank=8,64 --knob rows --seeds 3

A rank below the default number of vectors takes as many vectors as it can hold. A task may have
too few rows for a setting: with 1,024 rows a step and 16 vectors, 64 rows each are all there are.
Steps and time to AdamW's loss are read off the mean curves, before the schedule has run out, so
that `mkor compare --match`, which trains shorter runs for it, finds less. The file is written
after every race; --resume takes those that are in it already, made with the same settings and
versions on the same machine (leave it out when the code has changed).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
from knee_picture import BASE, MEANINGS, Record, default_of, draw

from mkor.bench.arguments import whole
from mkor.bench.cli import add_sizes, add_threads, add_warmup
from mkor.bench.compare import INTERRUPTED, checked_contestants, sizes_of
from mkor.bench.contestants import Part
from mkor.bench.curves import GREY, Line, Look, curve_of
from mkor.bench.errors import UnknownNameError, UsageError
from mkor.bench.files import FORMAT, plain, settings_record
from mkor.bench.machine import environment
from mkor.bench.memory import keep_memory
from mkor.bench.optimizers import check_all
from mkor.bench.places import prepare_folder
from mkor.bench.progress import Progress, make_progress
from mkor.bench.race import Race, Settings, mean, spread
from mkor.bench.report import loss_text
from mkor.bench.runner import planned_steps, run_race
from mkor.bench.summary import Summary, summarize
from mkor.bench.tables import print_table
from mkor.bench.tasks import Task, load_task, new_model
from mkor.bench.wrappers import wrapper_defaults

Value = int | None

KNOBS: Mapping[str, tuple[Value, ...]] = {
    "rank": (4, 8, 16, 32, 64, 128),
    "vectors": (1, 4, 8, 16, 32, 64),
    "rows": (4, 8, 16, 32, None),
    "update_every": (1, 2, 4, 10, 20),
}
HEADERS = (
    "setting", "held-out loss", "+-", "to default", "cpu ms", "wall ms", "time", "match", "time",
)  # fmt: skip


# ---------------------------------------------------------------------------------- what is asked


def text_of(value: Value) -> str:
    return "none" if value is None else str(value)


def value_of(knob: str, text: str) -> Value:
    text = text.strip().lower()
    if text == "none" and None in KNOBS[knob]:
        return None
    if not text.isdecimal() or int(text) < 1:
        also = " or none" if None in KNOBS[knob] else ""
        raise UsageError(f"--knob {knob}: {text!r} is no whole number from 1 up{also}.")
    return int(text)


def knobs_of(wanted: Sequence[str], defaults: Mapping[str, Value]) -> dict[str, tuple[Value, ...]]:
    """The values of each knob that is asked for, rising, the default among them."""
    asked: dict[str, tuple[Value, ...]] = {}
    for text in wanted or KNOBS:
        name, equals, values = text.partition("=")
        if name not in KNOBS:
            raise UnknownNameError("knob", name, KNOBS)
        if name in asked:
            raise UsageError(f"the knob {name!r} is given twice.")
        asked[name] = (
            tuple(value_of(name, each) for each in values.split(",")) if equals else KNOBS[name]
        )
    return {
        name: tuple(sorted({*values, defaults[name]}, key=lambda v: math.inf if v is None else v))
        for name, values in asked.items()
    }


def knob_defaults() -> dict[str, Value]:
    options = wrapper_defaults(Part("mkor"), BASE)
    return {knob: options[knob] for knob in KNOBS}


def changes(knob: str, value: Value, defaults: Mapping[str, Value]) -> dict[str, Value]:
    """The options that differ from the defaults."""
    if value == defaults[knob]:
        return {}
    vectors = defaults["vectors"]
    if knob == "rank" and value is not None and vectors is not None and value < vectors:
        return {"rank": value, "vectors": value}
    return {knob: value}


def label_of(changed: Mapping[str, Value]) -> str:
    """As `mkor compare` would have it."""
    options = ",".join(f"{key}={text_of(value)}" for key, value in changed.items())
    return f"mkor[{options}]+{BASE}" if options else f"mkor+{BASE}"


def settings_of(
    task: Task, knob: str, values: Iterable[Value], arguments: argparse.Namespace
) -> Settings:
    defaults = knob_defaults()
    labels = [BASE, *(label_of(changes(knob, value, defaults)) for value in values)]
    contestants = checked_contestants(",".join(labels))
    check_all(contestants, lambda: new_model(task, 0))
    return Settings(
        task=task,
        contestants=contestants,
        baseline=BASE,
        steps=arguments.steps or task.steps,
        seeds=arguments.seeds,
        warmup=arguments.warmup,
    )


def command_of(arguments: argparse.Namespace) -> str:
    """The command with those options that decide the results."""
    words = ["python benchmarks/knee.py", arguments.task]
    words += [f"--knob {knob}" for knob in arguments.knob]
    for name in ("steps", "seeds", "warmup", "threads", "width", "depth", "batch", "context"):
        value = getattr(arguments, name)
        words += [f"--{name} {value:g}"] if value is not None else []
    return " ".join(words)


# ------------------------------------------------------------------------------- what came of it


def plainly(value: object) -> Any:
    """As it reads when it comes from a file."""
    return json.loads(json.dumps(plain(value), allow_nan=False))


def reached(line: Line | None, target: float) -> tuple[float, float] | None:
    """Steps and CPU seconds at which a mean curve comes down to a loss, if it does."""
    if line is None:
        return None
    points = list(zip(line.steps, line.seconds, line.losses, strict=True))
    if points[0][2] <= target:
        return points[0][:2]
    for (step, second, loss), (next_step, next_second, next_loss) in pairwise(points):
        if next_loss <= target:
            part = (loss - target) / (loss - next_loss)
            return step + part * (next_step - step), second + part * (next_second - second)
    return None


def difference(losses: Sequence[float], others: Sequence[float]) -> Record:
    """Seed by seed: what makes a seed's batches hard makes them so for both."""
    pairs = [loss - other for loss, other in zip(losses, others, strict=True)]
    finite = all(map(math.isfinite, pairs))
    return {"mean": mean(pairs) if finite else None, "spread": spread(pairs)}


def contestant_record(race: Race, summary: Summary, default: str) -> Record:
    """All figures of a contestant."""
    label, base = summary.contestant, race.settings.baseline
    runs = race.of(label)
    look = Look(GREY, GREY, "solid", 1.0)
    curve, baseline = curve_of(race, label, look), curve_of(race, base, look)
    target = mean([run.loss for run in race.of(base)])
    match = reached(curve, target) if math.isfinite(target) else None
    return {
        "contestant": label,
        "lr": summary.trial.lr,
        "weight_decay": summary.trial.weight_decay,
        "losses": [run.loss for run in runs],
        "loss": summary.loss,
        "spread": summary.spread,
        "less_default": difference(
            [run.loss for run in runs], [run.loss for run in race.of(default)]
        ),
        "cpu_ms": summary.cpu_ms,
        "wall_ms": summary.wall_ms,
        "cpu_ratio": summary.cpu_ratio,
        "wall_ratio": summary.wall_ratio,
        "cpu_ratios": [
            run.cpu_seconds / other.cpu_seconds
            for run, other in zip(runs, race.of(base), strict=True)
        ],
        "state_bytes": summary.state_bytes,
        "match": match
        and {
            "steps": match[0],
            "cpu_seconds": match[1],
            "cpu_ratio": match[1] / baseline.seconds[-1] if baseline else None,
        },
        "curve": curve
        and {
            "steps": curve.steps,
            "cpu_seconds": curve.seconds,
            "losses": curve.losses,
            "low": curve.low,
            "high": curve.high,
        },
    }


def knob_record(race: Race, knob: str, values: Sequence[Value]) -> Record:
    """A knob's race: AdamW and, in the order of their values, the settings."""
    defaults = knob_defaults()
    default = label_of({})
    base, *others = (contestant_record(race, each, default) for each in summarize(race))
    settings = [
        {
            "value": value,
            "text": text_of(value),
            "default": value == defaults[knob],
            "changes": changes(knob, value, defaults),
            **record,
        }
        for value, record in zip(values, others, strict=True)
    ]
    return {"race": settings_record(race.settings), "baseline": base, "settings": settings}


# -------------------------------------------------------------------------------------- the races


def stored_knobs(path: Path, machine: Mapping[str, Any]) -> dict[str, Record]:
    """Races in the file that were run with these versions on such a machine, by knob."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = {**record.get("environment", {}), "date": None} == {**machine, "date": None}
    found: dict[str, Record] = record.get("knobs", {}) if same else {}
    return found


def store(record: Record, path: Path) -> None:
    """All at once, so that an interruption leaves a whole file."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run(
    record: Record,
    plans: Mapping[str, Settings],
    knobs: Mapping[str, tuple[Value, ...]],
    progress: Progress,
    path: Path | None,
) -> bool:
    """Races that are not in the record yet, each stored when it is complete; False if stopped."""
    pending = {knob: plan for knob, plan in plans.items() if knob not in record["knobs"]}
    for knob in record["knobs"]:
        progress.note(f"{knob} is there already")
    # The time left is that of all races; each adds its own steps again as it begins.
    progress.expect(sum(map(planned_steps, pending.values())))
    for index, (knob, settings) in enumerate(pending.items()):
        progress.note(f"race {index + 1}/{len(pending)}: {knob}")
        progress.expect(-planned_steps(settings))
        race = run_race(settings, progress)
        if race.interrupted:
            return False
        found = {"date": record["environment"]["date"], **knob_record(race, knob, knobs[knob])}
        record["knobs"][knob] = plainly(found)
        # In the order of the command, whichever were there before.
        record["knobs"] = {each: record["knobs"][each] for each in plans if each in record["knobs"]}
        if path:
            store(record, path)
    return True


def knee(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    if arguments.out is not None and not Path(arguments.out).is_dir():
        raise UsageError(f"--out {arguments.out}: there is no such folder.")
    if arguments.resume and arguments.out is None:
        raise UsageError("--resume needs --out, the folder with what is there already.")
    folder = prepare_folder(arguments.out)
    defaults = knob_defaults()
    knobs = knobs_of(arguments.knob, defaults)
    task = load_task(arguments.task, sizes_of(arguments))
    plans = {knob: settings_of(task, knob, values, arguments) for knob, values in knobs.items()}
    machine = plainly({**environment(), "memory_kept": keep_memory()})
    path = folder / "knee.json" if folder else None
    stored = stored_knobs(path, machine) if path and arguments.resume else {}
    record: Record = {
        "format": FORMAT,
        "command": command_of(arguments),
        "task": plainly(settings_record(next(iter(plans.values())))["task"]),
        "steps": arguments.steps or task.steps,
        "seeds": arguments.seeds,
        "warmup": arguments.warmup,
        "defaults": defaults,
        "environment": machine,
        "knobs": {
            knob: stored[knob]
            for knob, plan in plans.items()
            if stored.get(knob, {}).get("race") == plainly(settings_record(plan))
        },
    }
    with make_progress(sys.stderr, quiet=arguments.quiet) as progress:
        complete = run(record, plans, knobs, progress, path)
    if not record["knobs"]:
        print("interrupted before the first race was complete; nothing to show", file=sys.stderr)
        return INTERRUPTED
    show(record, sys.stdout)
    if path:
        draw(record, path.with_suffix(".png"))
        print(f"written: {path}, {path.with_suffix('.png')}")
    return 0 if complete else INTERRUPTED


# ---------------------------------------------------------------------------------- how it is shown


def cells(record: Record, name: str) -> list[str]:
    less, match = record["less_default"], record["match"]
    about = "" if less["spread"] is None else f" +- {less['spread']:.4f}"
    diverged = record["loss"] is None
    return [
        name,
        loss_text(math.inf if diverged else record["loss"]),
        "" if record["spread"] is None else f"{record['spread']:.4f}",
        "" if less["mean"] is None else f"{less['mean']:+.4f}{about}",
        *("" if diverged else f"{record[key]:.3g}" for key in ("cpu_ms", "wall_ms")),
        "" if diverged else f"{record['cpu_ratio']:.2f}x",
        f"{match['steps']:.0f}" if match else "-",
        f"{match['cpu_ratio']:.2f}x" if match else "-",
    ]


def show(record: Record, stream: TextIO) -> None:
    for knob, found in record["knobs"].items():
        rows = [cells(found["baseline"], BASE)]
        for each in found["settings"]:
            options = [f"{key}={text_of(value)}" for key, value in each["changes"].items()]
            name = ",".join(options) or f"{knob}={each['text']} (default)"
            rows.append(cells(each, name))
        marked = 1 + found["settings"].index(default_of(found))
        print(f"\n{knob}: {MEANINGS[knob]}", file=stream)
        print_table(HEADERS, rows, stream, marked=marked)
    ratios = ", ".join(f"{default_of(each)['cpu_ratio']:.2f}x" for each in record["knobs"].values())
    print(
        f"\n{record['task']['name']}: mean over {record['seeds']} seed(s) after "
        f"{record['steps']} steps; ms and time of a training step\n"
        "to default: the loss less the default's, seed by seed\n"
        f"time: CPU time over {BASE}'s; the default's by race, which tells how steady it is: "
        f"{ratios}\n"
        f"match: steps until the mean curve is down at {BASE}'s final loss; then their CPU time "
        f"over {BASE}'s whole run",
        file=stream,
        flush=True,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="knee", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("task", nargs="?", default="text-lm", help="as in mkor compare (text-lm)")
    add("--steps", type=whole(1), metavar="N", help="length of a run (the task's own)")
    add("--seeds", type=whole(1), default=2, metavar="K", help="seeds of each setting (2)")
    add(
        "--knob",
        action="append",
        default=[],
        metavar="NAME[=A,B]",
        help=f"vary this one only, and over these values; may be repeated ({', '.join(KNOBS)})",
    )
    add_warmup(parser)
    add_threads(parser)
    add("--out", metavar="DIR", help="a folder for knee.json and knee.png")
    add("--resume", action="store_true", help="keep the races that are in that folder's knee.json")
    add("--quiet", action="store_true", help="no progress, only the result")
    add_sizes(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return knee(arguments)
    except UsageError as error:
        print(f"knee: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
