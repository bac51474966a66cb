"""``benchmarks/knee.py``: what it trains, stores, prints, draws and refuses."""

import contextlib
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import knee
import knee_picture
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import mkor
from mkor.bench.contestants import parse_contestants
from mkor.bench.curves import COLOURS, GREY, Line, Look
from mkor.bench.progress import Progress
from mkor.bench.race import Race, Settings, Tuning
from mkor.bench.runner import run_race
from mkor.bench.tasks import load_task
from mkor.bench.training import Point, Run, Trial

FILE = Path(knee.__file__)
STEPS, SEEDS = 5, 2
SMALL = {"width": 16, "depth": 2, "batch": 64}
SIZES = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
RUN = ["digits-mlp", "--steps", str(STEPS), "--seeds", str(SEEDS), *SIZES, "--quiet"]
KNOBS = ["--knob", "rank=4", "--knob", "rows=none,2"]

Record = dict[str, Any]


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with results, and what was printed."""
    folder = tmp_path_factory.mktemp("knee")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert knee.main([*RUN, *KNOBS, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(name="record")
def _record(made: tuple[Path, str]) -> Record:
    return read(made[0])


def read(folder: Path) -> Record:
    found: Record = json.loads((folder / "knee.json").read_text())
    return found


def everyone(record: Record) -> list[Record]:
    """The figures of all contestants of all races."""
    races = record["knobs"].values()
    return [each for race in races for each in (race["baseline"], *race["settings"])]


def panel() -> Any:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.subplots()


def test_one_knob_varies_about_the_defaults(record: Record) -> None:
    assert list(record["knobs"]) == ["rank", "rows"]
    assert record["defaults"] == {"rank": 64, "vectors": 16, "rows": 32, "update_every": 1}
    for knob, values, labels in (
        ("rank", [4, 64], ["mkor[rank=4,vectors=4]+adamw", "mkor+adamw"]),
        ("rows", [2, 32, None], ["mkor[rows=2]+adamw", "mkor+adamw", "mkor[rows=none]+adamw"]),
    ):
        found = record["knobs"][knob]
        assert [each["value"] for each in found["settings"]] == values
        assert [each["contestant"] for each in found["settings"]] == labels
        assert found["baseline"]["contestant"] == "adamw"
        assert [each["default"] for each in found["settings"]] == [
            value == record["defaults"][knob] for value in values
        ]
        for value, label in zip(values, labels, strict=True):
            options = found["race"]["options"][label]["wrapper"]
            vectors = min(16, options["rank"])
            expected = {"rank": 64, "vectors": vectors, "rows": 32, "update_every": 1, knob: value}
            assert {key: options[key] for key in expected} == expected


def test_the_file_says_how_it_was_made(record: Record, made: tuple[Path, str]) -> None:
    assert (record["steps"], record["seeds"]) == (STEPS, SEEDS)
    assert record["task"]["name"] == "digits-mlp"
    assert record["task"]["sizes"] == SMALL
    assert record["environment"]["packages"]["mkor"] == mkor.__version__
    assert record["environment"]["threads"] == 1
    command = "digits-mlp --knob rank=4 --knob rows=none,2 --steps 5 --seeds 2"
    assert command in record["command"]
    assert str(made[0]) not in (made[0] / "knee.json").read_text()


def test_the_losses_are_those_of_the_same_contestants_elsewhere(record: Record) -> None:
    contestants = tuple(parse_contestants("adamw,mkor[rank=4,vectors=4]+adamw,mkor[rows=2]+adamw"))
    task = load_task("digits-mlp", SMALL)
    race = run_race(Settings(task, contestants, "adamw", STEPS, SEEDS), Progress())
    own = {each["contestant"]: each["losses"] for each in everyone(record)}
    for contestant in contestants:
        losses = [run.loss for run in race.of(contestant.label)]
        assert own[contestant.label] == pytest.approx(losses, rel=1e-5)
    assert len({tuple(losses) for losses in own.values()}) > 3


def test_what_takes_part_in_several_races_ends_alike_in_all(record: Record) -> None:
    for label in ("adamw", "mkor+adamw"):
        losses = [each["losses"] for each in everyone(record) if each["contestant"] == label]
        assert len(losses) == 2
        assert losses[0] == losses[1]


def test_figures_agree_with_each_other(record: Record) -> None:
    for found in record["knobs"].values():
        base, settings = found["baseline"], found["settings"]
        default = next(each for each in settings if each["default"])
        assert base["cpu_ratios"] == [1.0] * SEEDS
        assert base["match"]["steps"] <= STEPS
        for each in (base, *settings):
            curve, losses = each["curve"], each["losses"]
            assert each["loss"] == pytest.approx(statistics.fmean(losses))
            assert each["spread"] == pytest.approx(statistics.stdev(losses))
            assert each["loss"] == pytest.approx(curve["losses"][-1])
            assert curve["steps"][-1] == STEPS
            assert len(each["cpu_ratios"]) == SEEDS
            assert each["cpu_ratio"] == pytest.approx(each["cpu_ms"] / base["cpu_ms"])
            assert each["cpu_ms"] == pytest.approx(1e3 * curve["cpu_seconds"][-1] / STEPS)
            less = [a - b for a, b in zip(losses, default["losses"], strict=True)]
            assert each["less_default"]["mean"] == pytest.approx(statistics.fmean(less))
            if match := each["match"]:
                whole = base["curve"]["cpu_seconds"][-1]
                assert match["cpu_ratio"] == pytest.approx(match["cpu_seconds"] / whole)
                assert min(curve["losses"]) <= base["loss"]
            else:
                assert min(curve["losses"]) > base["loss"]
        assert default["less_default"] == {"mean": 0.0, "spread": 0.0}


def test_a_table_for_each_knob(record: Record, made: tuple[Path, str]) -> None:
    text = made[1]
    assert [line for line in text.splitlines() if line.startswith(("rank:", "rows:"))] == [
        "rank: vectors kept per side",
        "rows: rows in each vector",
    ]
    for knob, names in (
        ("rank", ["rank=4,vectors=4", "rank=64 (default)"]),
        ("rows", ["rows=2", "rows=32 (default)", "rows=none"]),
    ):
        for each, name in zip(record["knobs"][knob]["settings"], names, strict=True):
            (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
            assert line.removeprefix(name).split()[0] == f"{each['loss']:.4f}"
            assert f"{each['cpu_ratio']:.2f}x" in line
            assert f"{each['less_default']['mean']:+.4f}" in line


def test_the_picture_joins_the_values_and_marks_the_default(record: Record) -> None:
    found, axes = record["knobs"]["rows"], panel()
    marks = knee_picture.marks_of(found)
    assert [figures["text"] for figures, _ in marks] == ["adamw", "2", "32", "none"]
    colours = [colour for _, colour in marks]
    assert colours[0] == GREY
    assert colours[2] == COLOURS[1]
    assert len(set(colours)) == 4
    knee_picture.draw_values(axes, marks)
    joined = next(
        line for line in axes.lines if to_hex(line.get_color()).upper() == knee_picture.JOINING
    )
    assert joined.get_xdata() == pytest.approx([e["cpu_ratio"] for e in found["settings"]])
    assert joined.get_ydata() == pytest.approx([e["loss"] for e in found["settings"]])
    flat = [
        line for line in axes.lines if line.get_ydata() == pytest.approx([marks[0][0]["loss"]] * 2)
    ]
    assert len(flat) == 1
    knee_picture.write_values(axes, marks)
    weights = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert weights == {"adamw": "normal", "2": "normal", "32": "bold", "none": "normal"}


def test_there_is_a_picture(made: tuple[Path, str]) -> None:
    assert (made[0] / "knee.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in made[0].iterdir()} == {"knee.json", "knee.png"}


def test_texts_keep_clear_of_lines_and_of_each_other() -> None:
    place, size, corners = (100.0, 100.0), (6.0, 4.5), ((0.0, 0.0), (200.0, 200.0))
    right = (size[0] + knee_picture.NEAR, 0.0)
    left = (-right[0], 0.0)
    assert knee_picture.clearest(place, size, [place], [place], corners) == right
    wall = knee_picture.line_of((110.0, 80.0), (110.0, 120.0))
    assert knee_picture.clearest(place, size, wall, [place], corners) == left
    # Nor is there room beyond the panel, or nearer to another point.
    assert (
        knee_picture.clearest(place, size, [place], [place], ((0.0, 0.0), (110.0, 200.0))) == left
    )
    rival = (110.0, 100.0)
    assert knee_picture.clearest(place, size, [(0.0, 0.0)], [place, rival], corners) == left
    ring = [(100.0 + 15 * x, 100.0 + 12 * y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    x, y = knee_picture.clearest(place, size, ring, [place], corners)
    assert abs(x) > right[0]
    assert y


def test_what_diverged_is_told_and_not_drawn(record: Record, tmp_path: Path) -> None:
    found, axes = record["knobs"]["rank"], panel()
    lost = found["settings"][0]
    lost |= {"loss": None, "spread": None, "match": None, "curve": None}
    lost["less_default"] = {"mean": None, "spread": None}
    assert knee.cells(lost, "rank=4")[1] == "diverged"
    marks = knee_picture.marks_of(found)
    knee_picture.draw_values(axes, marks)
    knee_picture.write_values(axes, marks)
    assert {text.get_text() for text in axes.texts} == {"diverged: 4", "adamw", "64"}
    base = found["baseline"]
    base |= {"loss": None, "spread": None, "match": None, "curve": None}
    knee_picture.draw(record, tmp_path / "knee.png")
    assert (tmp_path / "knee.png").exists()


@pytest.mark.parametrize(
    ("target", "place"), [(2.5, (15.0, 1.5)), (2.0, (20.0, 2.0)), (1.9, None), (3.5, (10.0, 1.0))]
)
def test_where_a_curve_comes_down_to_a_loss(target: float, place: object) -> None:
    look = Look(GREY, GREY, "solid", 1.0)
    line = Line("x", look, (10, 20, 30), (1.0, 2.0, 3.0), (3.0, 2.0, 2.2), (), ())
    assert knee.reached(line, target) == place
    assert knee.reached(None, target) is None


def hand_made(label: str, losses: Sequence[float], seconds: float) -> Run:
    """A run with a point every ten steps."""
    curve = [
        Point(10 * count, loss, loss, seconds * count, seconds * count)
        for count, loss in enumerate(losses, 1)
    ]
    steps, total = curve[-1].step, curve[-1].cpu_seconds
    return Run(label, 0, steps, Trial(0.1, 0.0), losses[-1], total, total, 0, tuple(curve))


def test_what_it_takes_to_end_level_with_the_base() -> None:
    contestants = tuple(parse_contestants("adamw,mkor[rank=32]+adamw,mkor+adamw"))
    race = Race(Settings(load_task("digits-mlp", SMALL), contestants, "adamw", 30, 1))
    tuning = Tuning((), Trial(0.1, 0.0), at_edge=False)
    race.tunings = {contestant.label: tuning for contestant in contestants}
    curves = ((3.0, 2.5, 2.0), (2.9, 2.6, 2.1), (2.5, 1.5, 1.0))
    for contestant, losses, seconds in zip(contestants, curves, (1.0, 1.5, 2.0), strict=True):
        race.runs.append(hand_made(contestant.label, losses, seconds))
    found = knee.knob_record(race, "rank", (32, 64))
    assert found["baseline"]["match"] == {"steps": 30, "cpu_seconds": 3.0, "cpu_ratio": 1.0}
    smaller, default = found["settings"]
    assert smaller["match"] is None
    assert default["match"] == {"steps": 15, "cpu_seconds": 3.0, "cpu_ratio": 1.0}
    assert smaller["less_default"] == {"mean": pytest.approx(1.1), "spread": None}
    assert (smaller["cpu_ratios"], default["cpu_ratios"]) == ([1.5], [2.0])
    assert (smaller["default"], default["default"]) == (False, True)
    assert knee.cells(default, "default")[-2:] == ["15", "1.00x"]


def test_values_rise_and_the_default_is_among_them() -> None:
    defaults = {"rank": 64, "vectors": 16, "rows": 32, "update_every": 1}
    assert knee.knobs_of(["rows=none,64,4,4"], defaults) == {"rows": (4, 32, 64, None)}
    everything = knee.knobs_of([], defaults)
    assert list(everything) == ["rank", "vectors", "rows", "update_every"]
    assert all(defaults[knob] in values for knob, values in everything.items())
    assert knee.knobs_of(["rank"], defaults) == {"rank": everything["rank"]}
    assert knee.knob_defaults() == defaults


def test_what_is_stored_is_not_run_again(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read(made[0])
    stored = (made[0] / "knee.json").read_text()
    (tmp_path / "knee.json").write_text(stored)
    seen: list[tuple[str, ...]] = []

    def interrupted(settings: Settings, progress: Progress) -> Race:
        seen.append(tuple(contestant.label for contestant in settings.contestants))
        return Race(settings, interrupted=True)

    monkeypatch.setattr(knee, "run_race", interrupted)
    monkeypatch.setattr(knee, "draw", lambda _, path: path.touch())
    resume = [*RUN, "--out", str(tmp_path), "--resume"]
    assert knee.main([*resume, *KNOBS]) == 0
    assert seen == []
    assert (tmp_path / "knee.png").exists()
    # Of other values, of another length, and where nobody asks for what is there.
    assert knee.main([*resume, "--knob", "rank=4,8", "--knob", "rows=none,2"]) == 130
    assert knee.main([*resume, *KNOBS, "--steps", "6"]) == 130
    assert knee.main([*RUN, *KNOBS, "--out", str(tmp_path)]) == 130
    assert [len(labels) for labels in seen] == [4, 3, 3]
    assert read(tmp_path) == record
    # Nor what another machine made.
    record["environment"]["cpu"] = "another"
    (tmp_path / "knee.json").write_text(json.dumps(record))
    assert knee.main([*resume, *KNOBS]) == 130
    assert len(seen) == 4


def test_an_interruption_keeps_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    races: list[Race] = []

    def second_interrupted(settings: Settings, progress: Progress) -> Race:
        races.append(Race(settings, interrupted=True) if races else run_race(settings, progress))
        return races[-1]

    monkeypatch.setattr(knee, "run_race", second_interrupted)
    monkeypatch.setattr(knee, "draw", lambda _, path: path.touch())
    assert knee.main([*RUN, *KNOBS, "--out", str(tmp_path)]) == 130
    assert list(read(tmp_path)["knobs"]) == ["rank"]
    assert "rank=64 (default)" in capsys.readouterr().out
    monkeypatch.setattr(knee, "run_race", run_race)
    assert knee.main([*RUN, *KNOBS, "--out", str(tmp_path), "--resume"]) == 0
    assert list(read(tmp_path)["knobs"]) == ["rank", "rows"]


def test_the_time_left_counts_every_race(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Spy(Progress):
        def advance(self, label: str, step: int, value: float) -> None:
            super().advance(label, step, value)
            seen.append(self.total)

    spy = Spy()
    monkeypatch.setattr(knee, "make_progress", lambda stream, *, quiet: spy)
    assert knee.main([*RUN, *KNOBS]) == 0
    steps = (3 + 4) * SEEDS * STEPS
    assert set(seen) == {steps}
    assert spy.done == steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--knob", "rnak=4"], "unknown knob 'rnak'. Did you mean 'rank'?"),
        (["--knob", "rank=0"], "'0' is no whole number from 1 up."),
        (["--knob", "rank=none"], "'none' is no whole number from 1 up."),
        (["--knob", "rows=x"], "'x' is no whole number from 1 up or none."),
        (["--knob", "rank=4", "--knob", "rank"], "the knob 'rank' is given twice"),
        (["--knob", "vectors=128"], "rank=64 cannot hold the 128 vectors"),
        (["--out", "nowhere"], "--out nowhere: there is no such folder."),
        (["--resume"], "--resume needs --out"),
        (["--context", "8"], "digits-mlp has no --context"),
    ],
)
def test_a_wrong_request_is_told_before_anything_runs(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knee, "run_race", lambda *_: pytest.fail("it ran"))
    assert knee.main([*RUN, *words]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("knee: error: ")
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []
