"""What a race leaves behind: table, files, picture, progress."""

import csv
import io
import json
import math
import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mkor.bench.contestants import parse_contestants
from mkor.bench.race import run_race, write_files
from mkor.bench.results import (
    Match,
    Race,
    Settings,
    mean,
    plain,
    race_record,
    settings_record,
    spread,
)
from mkor.bench.show import (
    bytes_text,
    clock_text,
    curves_of,
    draw_panel,
    draw_race,
    looks_of,
    make_progress,
    print_conditions,
    print_report,
    print_table,
    short_labels,
)
from mkor.bench.tasks import load_task

DIVERGES = "sgd[lr=1e30]"
WRAPPED = "mkor[rank=16]+adamw"


@pytest.fixture(scope="module")
def race() -> Race:
    task = load_task("digits-mlp", {"width": 16, "depth": 2, "batch": 16})
    contestants = tuple(parse_contestants(f"adamw,{WRAPPED},{DIVERGES}"))
    settings = Settings(task, contestants, "adamw", steps=12, seeds=2, tune=3, match=True)
    return run_race(settings, make_progress(io.StringIO(), quiet=True))


def written(race: Race, folder: Path) -> dict[str, Path]:
    return {path.name: path for path in write_files(race, race_record(race), folder)}


def report(race: Race) -> str:
    stream = io.StringIO()
    print_report(race_record(race), stream)
    return stream.getvalue()


def test_files_hold_everything_and_betray_nothing(race: Race, tmp_path: Path) -> None:
    files = written(race, tmp_path)
    assert files.keys() == {"curves.png", "results.json", "curves.csv"}
    assert {path.name for path in tmp_path.iterdir()} == files.keys()
    assert files["curves.png"].read_bytes().startswith(b"\x89PNG")
    assert files["curves.png"].stat().st_size > 20_000
    text = files["results.json"].read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    task = record["settings"]["task"]
    assert task["sha256"] == race.settings.task.sha256
    assert task["sizes"] == {"width": 16, "depth": 2, "batch": 16}
    wrapper = {"name": "mkor", "options": {"rank": 16}}
    assert record["settings"]["contestants"][1]["wrapper"] == wrapper
    options = record["settings"]["options"][WRAPPED]["wrapper"]
    assert (options["rank"], options["momentum"]) == (16, 0.98)
    assert len(record["settings"]["trials"]["adamw"]) == 3
    assert record["environment"]["packages"]["torch"]
    assert record["environment"]["python"] == platform.python_version()
    assert record["environment"]["threads"] >= 1
    assert len(record["runs"]) == 6
    assert {run["seed"] for run in record["runs"]} == {0, 1}
    assert [run["loss"] for run in record["runs"] if run["contestant"] == DIVERGES] == [None] * 2
    assert len(record["tuning"]["adamw"]["trials"]) == 3
    assert record["match"].keys() == {WRAPPED, DIVERGES}
    for private in (platform.node(), str(Path.home()), os.getcwd(), str(tmp_path)):
        if len(private) > 3:
            assert private not in text


def test_summaries_are_means_over_seeds_and_ratios_to_the_baseline(race: Race) -> None:
    base, wrapped, diverged = race_record(race)["summary"]
    losses = [run.loss for run in race.of(WRAPPED)]
    assert wrapped["loss"] == pytest.approx(sum(losses) / 2)
    assert wrapped["spread"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
    steps, seconds = 24, sum(run.cpu_seconds for run in race.of(WRAPPED))
    assert wrapped["cpu_ms"] == pytest.approx(1e3 * seconds / steps)
    assert wrapped["cpu_ratio"] == pytest.approx(wrapped["cpu_ms"] / base["cpu_ms"])
    assert base["cpu_ratio"] == base["wall_ratio"] == 1.0
    assert diverged["loss"] is diverged["spread"] is None
    assert mean([1.0, math.inf]) == mean([math.nan]) == math.inf
    assert spread([1.0]) is spread([1.0, math.inf]) is None


def test_csv_has_a_line_for_each_point(race: Race, tmp_path: Path) -> None:
    with written(race, tmp_path)["curves.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("contestant", "seed", "step", "training_loss", "held_out_loss"),
        *("cpu_seconds", "wall_seconds", "switched_at"),
    ]
    assert len(rows) == sum(len(run.curve) for run in race.runs)
    last = [row for row in rows if row["contestant"] == "adamw" and row["seed"] == "1"][-1]
    assert float(last["held_out_loss"]) == race.of("adamw")[1].loss
    assert last["step"] == "12"


def test_the_table_says_who_got_where(race: Race) -> None:
    text = report(race)
    lines = {line.split("  ")[0]: line for line in text.splitlines() if "  " in line}
    assert f"{race.of('adamw')[0].trial.lr:g}" in lines["adamw"]
    assert lines["adamw"].endswith("1.00x")
    assert "diverged" in lines[DIVERGES]
    assert "> 12" in lines[DIVERGES]
    assert WRAPPED in lines
    assert text.count("tuning of") == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    cut = replace(race, interrupted=True, matches={}, runs=[r for r in race.runs if r.seed == 0])
    assert "interrupted: 1 of 2 seeds" in report(cut)


def test_conditions_name_the_data_and_the_grid(race: Race) -> None:
    stream = io.StringIO()
    print_conditions(race_record(race)["settings"], 1, stream)
    assert race.settings.task.sha256 in stream.getvalue()
    assert "adamw tries lr " in stream.getvalue()
    assert f"{DIVERGES} uses lr 1e+30" in stream.getvalue()


def switched(race: Race, *steps: int | None) -> Race:
    """The race as if the wrapped contestant had switched at these steps, seed by seed."""
    runs = [
        replace(run, switched_at=steps[run.seed]) if run.contestant == WRAPPED else run
        for run in race.runs
    ]
    return replace(race, runs=runs, matches={})


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((4, 6), "switched to the base at step 5 on average (by seed: 4, 6)"),
        ((None, 6), "switched to the base at step 6 on average (by seed: never, 6)"),
        ((None, None), None),
    ],
)
def test_report_and_files_have_the_step_of_the_switch(
    race: Race, steps: tuple[int | None, ...], said: str | None, tmp_path: Path
) -> None:
    once = switched(race, *steps)
    text = report(once)
    assert f"{WRAPPED} {said}\n" in text if said else "switched" not in text
    record = json.loads(written(once, tmp_path)["results.json"].read_text())
    found = {(run["contestant"], run["seed"]): run["switched_at"] for run in record["runs"]}
    assert (found[WRAPPED, 0], found[WRAPPED, 1]) == steps
    assert found["adamw", 0] is None
    with (tmp_path / "curves.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["contestant"] == WRAPPED]
    assert {row["switched_at"] for row in rows} == {str(s) if s else "" for s in steps}


def test_the_picture_shows_mean_curves_matches_and_switches(race: Race) -> None:
    from matplotlib.figure import Figure

    record = race_record(race)
    record["match"] = plain(
        {WRAPPED: vars(Match(WRAPPED, 1.5, 6, 1, 0.5, 0.75, 0.75, ())) | {"probes": []}}
    )
    record["summary"][1]["switched_at"] = 5.0
    curves = curves_of(record)
    assert {curve.label for curve in curves} == {"adamw", WRAPPED}
    adamw = next(curve for curve in curves if curve.label == "adamw")
    assert adamw.losses[-1] == pytest.approx(mean([run.loss for run in race.of("adamw")]))
    for time, ratio in ((False, 0.5), (True, 0.75)):
        axes = Figure().add_subplot()
        lines = draw_panel(axes, record, curves, time=time)
        assert [list(line.get_ydata()) for line in lines] == [curve.losses for curve in curves]
        diamond, switch = (
            next(line for line in axes.lines if line.get_marker() == shape) for shape in "Dv"
        )
        whole = (adamw.seconds if time else adamw.steps)[-1]
        assert diamond.get_xdata()[0] == pytest.approx(ratio * whole)
        assert diamond.get_ydata()[0] == 1.5
        wrapped = next(curve for curve in curves if curve.label == WRAPPED)
        assert switch.get_ydata()[0] in wrapped.losses


def test_pictures_of_diverged_runs_and_of_stored_races_can_be_drawn(
    race: Race, tmp_path: Path
) -> None:
    nothing = replace(race, runs=[replace(run, curve=()) for run in race.runs], matches={})
    assert curves_of(race_record(nothing)) == []
    written(nothing, tmp_path)
    stored = Path(__file__).parents[2] / "docs" / "results" / "digits-mlp" / "results.json"
    draw_race(json.loads(stored.read_text()), tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "names",
    ["sgd,lamb,mkor+lamb,mkor[rank=16]+lamb", "sgd,mkor+sgd,kfac+sgd,kfac[damping=1]+sgd"],
)
def test_lines_differ_in_colour_width_or_dashes(race: Race, names: str) -> None:
    contestants = tuple(parse_contestants(names))
    settings = replace(race.settings, contestants=contestants, baseline="sgd")
    base, *others = looks_of(settings_record(settings)).values()
    assert len({tuple(look.items()) for look in (base, *others)}) == 4
    assert base["color"] not in {look["color"] for look in others}
    # One colour for each base; where all have the same, one for each wrapper.
    assert len({look["color"] for look in others}) == (1 if "lamb" in names else 2)


def test_labels_drop_their_options_where_names_are_enough() -> None:
    assert short_labels(["adamw", "mkor[a=1,b=2]+adamw"]) == ["adamw", "mkor+adamw"]
    assert short_labels(["mkor[a=1,b=2]+adamw", "mkor+adamw"]) == [
        "mkor[a=1,\nb=2]\n+adamw",
        "mkor+adamw",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["plain", "terminal", "quiet"])
def test_progress_shows_losses_and_the_time_left(
    race: Race, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("mkor.bench.show.LINE_SECONDS", 1e-9)
    monkeypatch.setattr("mkor.bench.show.REFRESH_SECONDS", 1e-9)
    stream = Terminal() if kind == "terminal" else io.StringIO()
    with make_progress(stream, quiet=kind == "quiet") as progress:
        run_race(replace(race.settings, tune=1, match=False), progress)
        progress.note("noted [this]")
    text = stream.getvalue()
    if kind == "quiet":
        assert text == ""
        return
    assert "noted [this]" in text
    assert "mkor[rank=16]+adamw" in text
    assert re.search(r"\d:\d\d left", text)
    if kind == "plain":
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
        assert re.search(r"seed 1/2, step 12, loss: .*adamw \d\.\d+.*; 0:\d\d left", text)
    else:
        assert re.search(r"loss \d\.\d\d\d", text)
    assert "seed 2/2: held-out loss adamw " in text.replace("\n", " ")


def test_small_things_for_reading() -> None:
    assert clock_text(64.9) == "1:05"
    assert [bytes_text(n) for n in (3, 3200, 3.2e6, 3.2e9)] == ["3 B", "3.2 kB", "3.2 MB", "3.2 GB"]
    assert plain({"a": (1, float("nan")), "b": Path("x")}) == {"a": [1, None], "b": "x"}
    stream, terminal = io.StringIO(), Terminal()
    for each in (stream, terminal):
        print_table(["a", "b"], [["xx", "1"], ["y", "100"]], each, marked=0)
    assert stream.getvalue().splitlines() == ["a     b", "-------", "xx    1", "y   100"]
    assert terminal.getvalue().splitlines()[2] == "\x1b[1mxx    1\x1b[0m"
