"""What a race leaves behind: table, files, picture, progress."""

import csv
import io
import json
import os
import platform
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mkor.bench.compare import write_files
from mkor.bench.contestants import parse_contestants
from mkor.bench.curves import GREY, Line, Look, dodge, lines_of, looks, short_labels
from mkor.bench.files import COLUMNS, plain, write_csv, write_json
from mkor.bench.match import Match
from mkor.bench.plot import draw_panel, subtitle
from mkor.bench.progress import LiveProgress, PlainProgress, Progress, clock, make_progress
from mkor.bench.race import Race, Settings
from mkor.bench.report import print_conditions, print_report
from mkor.bench.runner import run_race
from mkor.bench.tables import bytes_text, plain_table, print_table
from mkor.bench.tasks import load_task

DIVERGES = "sgd[lr=1e30]"


@pytest.fixture(scope="module")
def race() -> Race:
    task = load_task("digits-mlp", {"width": 16, "depth": 2, "batch": 16})
    contestants = tuple(parse_contestants(f"adamw,mkor[rank=16]+adamw,{DIVERGES}"))
    settings = Settings(task, contestants, "adamw", steps=12, seeds=2, tune=3, match=True)
    return run_race(settings, Progress())


def test_files_are_written(race: Race, tmp_path: Path) -> None:
    files = write_files(race, tmp_path)
    assert sorted(path.name for path in files.values()) == [
        "curves.csv",
        "curves.png",
        "results.json",
    ]
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    assert files["picture"].stat().st_size > 20_000


def test_json_holds_everything_and_betrays_nothing(race: Race, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(race, path)
    text = path.read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["settings"]["task"]["sha256"] == race.settings.task.sha256
    assert record["settings"]["task"]["sizes"] == {"width": 16, "depth": 2, "batch": 16}
    assert record["settings"]["contestants"][1]["wrapper"] == {
        "name": "mkor",
        "options": {"rank": 16},
    }
    options = record["settings"]["options"]["mkor[rank=16]+adamw"]
    assert options["wrapper"]["rank"] == 16
    assert options["wrapper"]["momentum"] == 0.98
    assert len(record["settings"]["trials"]["adamw"]) == 3
    assert record["environment"]["packages"]["torch"]
    assert record["environment"]["python"] == platform.python_version()
    assert record["environment"]["threads"] >= 1
    assert len(record["runs"]) == 6
    assert {run["seed"] for run in record["runs"]} == {0, 1}
    assert [run["loss"] for run in record["runs"] if run["contestant"] == DIVERGES] == [None] * 2
    assert len(record["tuning"]["adamw"]["trials"]) == 3
    assert record["match"].keys() == {"mkor[rank=16]+adamw", DIVERGES}
    for private in (platform.node(), str(Path.home()), os.getcwd(), str(tmp_path)):
        if len(private) > 3:
            assert private not in text


def test_csv_has_a_line_for_each_point(race: Race, tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    write_csv(race, path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == sum(len(run.curve) for run in race.runs)
    last = [row for row in rows if row["contestant"] == "adamw" and row["seed"] == "1"][-1]
    assert float(last["held_out_loss"]) == race.of("adamw")[1].loss
    assert last["step"] == "12"


def test_the_table_says_who_got_where(race: Race) -> None:
    stream = io.StringIO()
    print_report(race, stream)
    text = stream.getvalue()
    lines = {line.split("  ")[0]: line for line in text.splitlines() if "  " in line}
    assert f"{race.of('adamw')[0].trial.lr:g}" in lines["adamw"]
    assert lines["adamw"].endswith("1.00x")
    assert "diverged" in lines[DIVERGES]
    assert "> 12" in lines[DIVERGES]
    assert "mkor[rank=16]+adamw" in lines
    assert text.count("tuning of") == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_an_interrupted_race_says_so(race: Race) -> None:
    stream = io.StringIO()
    cut = replace(race, interrupted=True, matches={}, runs=[r for r in race.runs if r.seed == 0])
    print_report(cut, stream)
    assert "interrupted: 1 of 2 seeds" in stream.getvalue()


def test_conditions_name_the_data_and_the_grid(race: Race) -> None:
    stream = io.StringIO()
    print_conditions(race.settings, 1, stream)
    text = stream.getvalue()
    assert race.settings.task.sha256 in text
    assert "adamw tries lr " in text
    assert f"{DIVERGES} uses lr 1e+30" in text


def test_a_picture_of_diverged_runs_alone_can_be_drawn(race: Race, tmp_path: Path) -> None:
    nothing = replace(race, runs=[replace(run, curve=()) for run in race.runs], matches={})
    assert lines_of(nothing) == []
    write_files(nothing, tmp_path)


def test_labels_keep_their_distance_and_stay_near() -> None:
    assert dodge([0.1, 0.5, 0.9], [0.1] * 3) == pytest.approx([0.1, 0.5, 0.9])
    moved = dodge([0.5, 0.5, 0.52, 0.1], [0.1, 0.1, 0.3, 0.1])
    assert moved[3] == pytest.approx(0.1)
    assert [b - a for a, b in pairwise(moved[:3])] == pytest.approx([0.1, 0.2])
    assert sum(moved[:3]) == pytest.approx(0.5 + 0.5 + 0.52)
    assert dodge([-0.2, 0.0], [0.1, 0.1]) == pytest.approx([0.0, 0.1])
    assert dodge([1.3, 0.99], [0.1, 0.1]) == pytest.approx([1.0, 0.9])
    assert dodge([], []) == []


def test_a_colour_for_each_base(race: Race) -> None:
    chosen = looks(race)
    assert chosen["adamw"].colour == GREY
    assert len({look.colour for look in chosen.values()}) == 3
    names = "sgd,lamb,mkor+lamb,mkor[rank=16]+lamb"
    settings = replace(race.settings, contestants=tuple(parse_contestants(names)), baseline="sgd")
    _, base, first, second = looks(Race(settings)).values()
    assert first.colour == second.colour == base.ink != base.colour
    assert first.style != second.style
    assert first.width > base.width


def test_wrappers_over_one_base_have_colours_of_their_own(race: Race) -> None:
    names = "sgd,mkor+sgd,mkor[rank=16]+sgd,kfac+sgd,eva+sgd,adamw"
    contestants = tuple(parse_contestants(names))
    settings = replace(race.settings, contestants=contestants[:-1], baseline="sgd")
    _, first, second, kfac, eva = looks(Race(settings)).values()
    assert first.colour == second.colour
    assert first.style != second.style
    assert len({first.colour, kfac.colour, eva.colour}) == 3
    several = looks(Race(replace(settings, contestants=contestants)))
    assert several["kfac+sgd"].colour == several["eva+sgd"].colour == several["mkor+sgd"].colour


def switched(race: Race, *steps: int | None) -> Race:
    """The race as if the wrapped contestant had switched at these steps, seed by seed."""
    runs = [
        replace(run, switched_at=steps[run.seed]) if run.contestant.startswith("mkor") else run
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
def test_the_report_says_when_the_base_went_on_alone(
    race: Race, steps: tuple[int | None, ...], said: str | None
) -> None:
    stream = io.StringIO()
    print_report(switched(race, *steps), stream)
    if said:
        assert f"mkor[rank=16]+adamw {said}\n" in stream.getvalue()
    assert stream.getvalue().count("switched") == (said is not None)


def test_a_single_seed_needs_no_average(race: Race) -> None:
    one = switched(race, 4, 6)
    stream = io.StringIO()
    print_report(replace(one, runs=[run for run in one.runs if run.seed == 1]), stream)
    assert "mkor[rank=16]+adamw switched to the base at step 6\n" in stream.getvalue()


def test_files_hold_the_step_of_the_switch(
    race: Race, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkor.bench.plot.draw", lambda race, path: path.touch())
    files = write_files(switched(race, 4, None), tmp_path)
    record = json.loads(files["results"].read_text())
    steps = {(run["contestant"], run["seed"]): run["switched_at"] for run in record["runs"]}
    assert steps["mkor[rank=16]+adamw", 0] == 4
    assert steps["mkor[rank=16]+adamw", 1] is steps["adamw", 0] is None
    means = {each["contestant"]: each["switched_at"] for each in record["summary"]}
    assert means == {"adamw": None, "mkor[rank=16]+adamw": 4, DIVERGES: None}
    with files["curves"].open() as file:
        rows = list(csv.DictReader(file))
    wrapped = [row for row in rows if row["contestant"].startswith("mkor")]
    assert {(row["seed"], row["switched_at"]) for row in wrapped} == {("0", "4"), ("1", "")}


def test_the_picture_marks_the_switch(race: Race) -> None:
    from matplotlib.figure import Figure

    once = switched(race, 4, 6)
    for time in (False, True):
        axes = Figure().add_subplot()
        draw_panel(axes, once, lines_of(once), time=time)
        (mark,) = [line for line in axes.lines if line.get_marker() == "v"]
        (line,) = [line for line in lines_of(once) if line.switched_at is not None]
        assert mark.get_color() == line.look.colour == looks(once)[line.label].colour
        assert line.steps[0] < 5 < line.steps[-1]
        before = max(index for index, step in enumerate(line.steps) if step <= 5)
        assert mark.get_ydata()[0] == pytest.approx(line.at(5)[1])
        across = line.seconds if time else line.steps
        assert across[before] <= mark.get_xdata()[0] <= across[before + 1]
        assert [text.get_text() for text in axes.texts] == ([] if time else ["switch 5"])
    assert "triangles" in subtitle(once)
    assert "triangles" not in subtitle(switched(race, None, None))


def test_a_place_on_a_curve_lies_between_its_points() -> None:
    look = Look("#0072B2", "#0072B2", "solid", 1.0)
    line = Line("x", look, [2, 4, 8], [1.0, 2.0, 6.0], [9.0, 5.0, 1.0], [], [])
    assert line.at(3) == (1.5, 7.0)
    assert line.at(8) == (6.0, 1.0)
    assert line.at(1) == line.at(2) == (1.0, 9.0)
    assert line.at(6) == (4.0, 3.0)


def test_labels_drop_their_options_where_names_are_enough() -> None:
    assert short_labels(["adamw", "mkor[a=1,b=2]+adamw"]) == ["adamw", "mkor+adamw"]
    assert short_labels(["mkor[a=1,b=2]+adamw", "mkor+adamw"]) == [
        "mkor[a=1,\nb=2]\n+adamw",
        "mkor+adamw",
    ]


def test_a_match_that_failed_is_not_drawn(race: Race, tmp_path: Path) -> None:
    failed = Match("mkor[rank=16]+adamw", 1.0, None, 1, None, None, None, ())
    write_files(replace(race, matches={failed.contestant: failed}), tmp_path)


def test_progress_without_a_terminal_is_plain(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mkor.bench.progress.LINE_SECONDS", 0.0)
    stream = io.StringIO()
    progress = make_progress(stream, quiet=False)
    assert type(progress) is PlainProgress
    with progress:
        run_race(replace(race.settings, tune=1, match=False), progress)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert re.search(r"seed 1/2, step 12, loss: .*adamw \d\.\d+.*; 0:\d\d left", text)
    assert "seed 2/2: held-out loss adamw " in text


def test_progress_on_a_terminal_has_bars_losses_and_the_time_left(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("mkor.bench.progress.REFRESH_SECONDS", 0.0)
    stream = Terminal()
    progress = make_progress(stream, quiet=False)
    assert type(progress) is LiveProgress
    with progress:
        run_race(replace(race.settings, tune=1, match=False, seeds=1), progress)
    text = stream.getvalue()
    assert "mkor[rank=16]+adamw" in text
    assert re.search(r"loss \d\.\d\d\d", text)
    assert re.search(r"\d:\d\d left", text)


def test_quiet_is_quiet(race: Race) -> None:
    stream = io.StringIO()
    with make_progress(stream, quiet=True) as progress:
        run_race(replace(race.settings, tune=1, match=False, seeds=1, steps=2), progress)
        progress.note("nothing")
    assert stream.getvalue() == ""


def test_small_things_for_reading() -> None:
    assert clock(64.9) == "1:05"
    assert [bytes_text(n) for n in (3, 3200, 3.2e6, 3.2e9)] == ["3 B", "3.2 kB", "3.2 MB", "3.2 GB"]
    assert plain_table(["a", "b"], [["xx", "1"], ["y", "100"]]).splitlines() == [
        "a     b",
        "-------",
        "xx    1",
        "y   100",
    ]
    assert plain({"a": (1, float("nan")), "b": Path("x")}) == {"a": [1, None], "b": "x"}


@pytest.mark.parametrize(("columns", "plain"), [("40", True), ("200", False)])
def test_a_table_too_wide_for_the_terminal_is_not_cut(
    columns: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a narrow terminal the columns are whole, without drawing."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    headers = ["contestant", *(f"column {number}" for number in range(8))]
    print_table(headers, [["mkor"] + ["1.234"] * 8], stream)
    assert stream.getvalue().count("1.234") == 8
    assert "\u2026" not in stream.getvalue()
    assert ("\x1b" not in stream.getvalue()) == plain
