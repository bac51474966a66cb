"""Stored results made again: races, pages, figures."""

import argparse
import json
import platform
from concurrent.futures import ThreadPoolExecutor as Threads
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from mkor.bench import reproduce as module
from mkor.bench.cli import UsageError, main
from mkor.bench.contestants import RATES, WRAPPERS, Wrapper, check_names, parse_contestants
from mkor.bench.reproduce import (
    BASES,
    Plan,
    cell,
    draw_panel,
    is_complete,
    plans_of,
    put_block,
    run_apart,
    run_plan,
    run_side_by_side,
    settings_of,
    table,
    task_block,
)
from mkor.bench.show import Progress
from support.processes import Forking

SMALL = ("mkor[rank=8,vectors=2]", "eva")
MARKS = ("<!-- begin {}: made by a command -->", "<!-- end {} -->")
QUICK = ["--tasks", "digits-conv", "--steps-scale", "0.01", "--seeds", "2", "--tune", "2"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AROUND", SMALL)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files."""
    monkeypatch.setattr(module, "draw_race", lambda record, path: path.touch())
    monkeypatch.setattr(module, "draw_task", lambda task, found, path: path.touch())


def reproduce(out: Path, *more: str) -> int:
    return main(["reproduce", "rules", "--out", str(out), "--quiet", *QUICK, *more])


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def times(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.rglob("results.json")}


def arguments(**changes: object) -> argparse.Namespace:
    values = {"tasks": None, "bases": None, "seeds": 3, "tune": 3, "steps_scale": 1.0, **changes}
    return argparse.Namespace(**values)


@pytest.mark.usefixtures("few")
def test_races_are_stored_and_the_page_is_made_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path, "--bases", "adamw,sgd") == 0
    text = capsys.readouterr()
    assert text.err == ""
    assert "rules.md" in text.out
    assert files(tmp_path) == {
        "rules.md",
        "rules/digits-conv.png",
        "rules/digits-conv-sgd/results.json",
        "rules/digits-conv-sgd/curves.png",
        "rules/digits-conv-adamw/results.json",
        "rules/digits-conv-adamw/curves.png",
    }
    record = json.loads((tmp_path / "rules/digits-conv-sgd/results.json").read_text())
    assert record["settings"]["steps"] == 3
    assert record["settings"]["baseline"] == "sgd"
    assert [len(trials) for trials in record["settings"]["trials"].values()] == [2, 2, 2]
    assert len(record["runs"]) == 6
    page = (tmp_path / "rules.md").read_text()
    assert "`mkor reproduce rules --seeds 2 --tune 2 --tasks digits-conv --bases adamw,sgd" in page
    assert "| eva |" in page
    assert f"python {platform.python_version()}" in page
    assert "](rules/digits-conv.png)" in page
    assert "3 steps, 2 seed(s), 2 learning rate(s) each" in page
    assert str(tmp_path) not in page
    for race in record["summary"]:
        assert f"{race['loss']:.4f} +- {race['spread']:.4f}" in page


@pytest.mark.usefixtures("few", "undrawn")
def test_what_is_complete_is_not_run_again_and_text_is_kept(tmp_path: Path) -> None:
    assert reproduce(tmp_path, "--bases", "sgd", "--seeds", "1") == 0
    before, page = times(tmp_path), tmp_path / "rules.md"
    begin, end = (line.format("digits-conv") for line in MARKS)
    said = page.read_text().replace(begin, f"Said by hand.\n\n{begin}").replace("| eva |", "| x |")
    page.write_text(said + "\nAnd after it.\n")
    assert reproduce(tmp_path, "--bases", "sgd,lamb", "--seeds", "1") == 0
    assert times(tmp_path)["digits-conv-sgd"] == before["digits-conv-sgd"]
    again = page.read_text()
    assert "Said by hand.\n\n" + begin in again
    assert again.endswith(f"{end}\n\nAnd after it.\n")
    assert "| eva |" in again
    assert "| x |" not in again
    assert "|  | sgd | lamb |" in again


@pytest.mark.usefixtures("few", "undrawn")
def test_other_settings_and_damaged_files_are_run_again(tmp_path: Path) -> None:
    plan = Plan("a", "digits-conv", ("sgd", "eva+sgd"), 1, 1, 0.01)
    path = tmp_path / "a" / "results.json"
    assert not is_complete(path, settings_of(plan))
    assert run_plan(plan, tmp_path, Progress())
    assert is_complete(path, settings_of(plan))
    others = [
        Plan("a", "digits-conv", ("sgd", "eva+sgd"), 2, 1, 0.01),
        Plan("a", "digits-conv", ("sgd", "eva+sgd"), 1, 2, 0.01),
        Plan("a", "digits-conv", ("sgd", "eva+sgd"), 1, 1, 0.02),
        Plan("a", "digits-conv", ("sgd", "eva[damping=0.5]+sgd"), 1, 1, 0.01),
        Plan("a", "digits-mlp", ("sgd", "eva+sgd"), 1, 1, 0.01),
    ]
    for other in others:
        assert not is_complete(path, settings_of(other)), other
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "interrupted": True}))
    assert not is_complete(path, settings_of(plan))
    path.write_text(path.read_text()[:100])
    assert not is_complete(path, settings_of(plan))


@pytest.mark.usefixtures("undrawn")
def test_another_centre_or_default_counts_as_another_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("a", "digits-conv", ("sgd", "eva+sgd"), 1, 1, 0.01)
    assert run_plan(plan, tmp_path, Progress())
    path = tmp_path / "a" / "results.json"
    with monkeypatch.context() as patch:
        patch.setitem(RATES, "digits-conv", {**RATES["digits-conv"], "eva+sgd": 0.3})
        assert not is_complete(path, settings_of(plan))
    with monkeypatch.context() as patch:
        patch.setitem(WRAPPERS, "eva", Wrapper("Eva", {"damping": 0.5}))
        assert not is_complete(path, settings_of(plan))
    assert is_complete(path, settings_of(plan))


@pytest.mark.usefixtures("few", "undrawn")
def test_an_interruption_keeps_the_races_that_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = Progress.advance, [0]

    def interrupt(progress: Progress, label: str, step: int, value: float) -> None:
        real(progress, label, step, value)
        count[0] += 1
        # A race takes (2 trials + 2 seeds) x 3 contestants x 3 steps.
        if count[0] == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        assert reproduce(tmp_path) == 130
    assert times(tmp_path).keys() == {"digits-conv-sgd"}
    assert "|  | sgd |\n" in (tmp_path / "rules.md").read_text()
    assert not list(tmp_path.rglob("*.part"))
    before = times(tmp_path)
    assert reproduce(tmp_path) == 0
    assert times(tmp_path).items() > before.items()
    assert len(times(tmp_path)) == 3


def test_races_side_by_side_end_as_they_do_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forking = Forking()
    monkeypatch.setattr(module, "multiprocessing", forking)
    plans = [
        Plan(f"{base}-race", "digits-conv", (base, f"eva+{base}"), 1, 1, 0.01)
        for base in ("sgd", "adamw")
    ]
    assert module.run_all(plans, tmp_path / "one", Progress(), 1, quiet=True)
    assert module.run_all(plans, tmp_path / "two", Progress(), 2, quiet=True)
    assert forking.asked == ["spawn"]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for plan in plans:
        one, two = (
            json.loads((tmp_path / jobs / plan.name / "results.json").read_text())
            for jobs in ("one", "two")
        )
        assert [run["loss"] for run in one["runs"]] == [run["loss"] for run in two["runs"]]
        assert two["environment"]["threads"] == 1


def test_no_race_is_begun_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def run(plan: Plan, folder: Path, quiet: bool) -> bool:
        begun.append(plan.name)
        return plan.name != "b"

    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda jobs, mp_context: Threads(jobs))
    monkeypatch.setattr(module, "run_apart", run)
    plans = [Plan(name, "digits-conv", ("sgd",), 1, 1) for name in "abcdef"]
    assert not run_side_by_side(plans, tmp_path, Progress(), 1, quiet=True)
    assert begun == ["a", "b"]
    assert run_side_by_side(plans[2:], tmp_path, Progress(), 2, quiet=True)
    assert sorted(begun[2:]) == ["c", "d", "e", "f"]


def test_a_killed_process_is_said_and_complete_races_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(plan: Plan, folder: Path, quiet: bool) -> bool:
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda jobs, mp_context: Threads(jobs))
    monkeypatch.setattr(module, "run_apart", die)
    plans = [Plan(name, "digits-conv", ("sgd",), 1, 1) for name in "ab"]
    with pytest.raises(UsageError, match="complete races are kept"):
        run_side_by_side(plans, tmp_path, Progress(), 2, quiet=True)


@pytest.mark.usefixtures("undrawn")
def test_progress_says_which_race_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 1e-9)
    plan = Plan("some-race", "digits-conv", ("sgd",), 1, 1, 0.01)
    assert run_apart(plan, tmp_path, quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("some-race: ") for line in lines)
    assert any("seed 1/1, step 3, loss: sgd" in line for line in lines)


def test_the_recipe_has_nine_races_with_equal_tuning() -> None:
    plans = plans_of(arguments())
    assert len({plan.name for plan in plans}) == len(plans) == 9
    assert {(plan.seeds, plan.tune) for plan in plans} == {(3, 3)}
    for plan in plans:
        base = plan.contestants[0]
        contestants = parse_contestants(",".join(plan.contestants))
        assert len(contestants) == 10
        assert {who.base.name for who in contestants} == {base}
        for who in contestants:
            check_names(who)
    assert {plan.name for plan in plans_of(arguments(tasks=["text-lm"], bases=["sgd"]))} == {
        "text-lm-sgd"
    }


@pytest.mark.parametrize("base", BASES)
def test_every_contestant_of_the_recipe_can_be_made(base: str) -> None:
    (plan,) = plans_of(arguments(tasks=["digits-conv"], bases=[base], steps_scale=0.5))
    settings = settings_of(plan)
    assert settings.steps == settings.task.steps / 2
    assert settings.baseline == base


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "text"], "Did you mean 'text-lm'"),
        (["--bases", "sgd,adamv"], "Did you mean 'adamw'"),
        (["--out", __file__], "--out"),
    ],
)
def test_wrong_requests_are_said(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not files(tmp_path)


def test_a_block_is_replaced_and_the_rest_stays() -> None:
    begin, end = (line.format("x") for line in MARKS)
    page = put_block("# T\n", "x", "one\n", "## X")
    assert page == f"# T\n\n## X\n\n{begin}\none\n{end}\n"
    page = put_block(page.replace("## X", "## Mine") + "\nbelow\n", "x", "two", "## X")
    assert page == f"# T\n\n## Mine\n\n{begin}\ntwo\n{end}\n\nbelow\n"
    both = put_block(page, "xx", "three")
    assert both.startswith(page.rstrip())
    assert put_block(both, "x", "two") == both
    for broken in (begin, end, f"{end} b {begin}"):
        with pytest.raises(UsageError, match="needs both"):
            put_block(f"a {broken} b", "x", "new")


def summary(label: str, loss: float | None, **more: object) -> dict[str, object]:
    return {
        "contestant": label,
        "trial": {"lr": 0.1, "weight_decay": 0.0},
        "loss": loss,
        "spread": None if loss is None else 0.25,
        "cpu_ms": 2.0,
        "state_bytes": 100,
        **more,
    }


@pytest.fixture
def record() -> dict[str, object]:
    labels = ("sgd", "mkor+sgd", "kfac+sgd")
    return {
        "settings": {
            "steps": 7,
            "seeds": 2,
            "tune": 3,
            "task": {"data": "numbers", "sizes": {"width": 5}},
        },
        "summary": [
            summary("sgd", 1.5),
            summary("mkor+sgd", 1.25, cpu_ms=3.0, state_bytes=250),
            summary("kfac+sgd", None),
        ],
        "tuning": {label: {"at_edge": label == "mkor+sgd"} for label in labels},
        "runs": [{"contestant": label, "loss": 1.0} for label in labels]
        + [{"contestant": "kfac+sgd", "loss": None}],
    }


def test_a_cell_has_loss_rate_time_and_memory(record: dict[str, object]) -> None:
    assert cell(record, "", "sgd") == "1.5000 +- 0.2500<br>lr 0.1, time 1.00x, state 1.00x"
    assert (
        cell(record, "mkor", "sgd") == "**1.2500 +- 0.2500**<br>lr 0.1\\*, time 1.50x, state 2.50x"
    )
    record["summary"][0]["loss"] = 1.5e21
    assert cell(record, "", "sgd").startswith("1.5e+21 +- 0.25<br>")
    assert cell(record, "kfac", "sgd").startswith("diverged (1 of 2)<br>lr 0.1, ")
    assert cell(record, "eva", "sgd") == cell(None, "mkor", "sgd") == "-"


@pytest.mark.usefixtures("few")
def test_a_table_has_a_row_for_each_contestant(record: dict[str, object]) -> None:
    lines = table({"sgd": record}).splitlines()
    assert lines[:2] == ["|  | sgd |", "| --- | --- |"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| base alone",
        *(f"| {around}" for around in SMALL),
    ]


def test_races_of_one_task_that_differ_are_told_apart(record: dict[str, object]) -> None:
    same = task_block("t", {"sgd": record, "adamw": record}, "rules/t.png")
    assert same.count("7 steps") == 1
    assert "[adamw](rules/t-adamw/curves.png)" in same
    other = {**record, "settings": {**record["settings"], "seeds": 1}}
    mixed = task_block("t", {"sgd": record, "adamw": other}, "rules/t.png")
    assert "- sgd: width 5; 7 steps, 2 seed(s)" in mixed
    assert "- adamw: width 5; 7 steps, 1 seed(s)" in mixed


def test_the_figure_writes_what_it_cannot_draw() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    losses = (1.0, 0.5, 40.0, None)
    draw_panel(axes, "sgd", [*(summary("x", loss) for loss in losses), None])
    assert [text.get_text()[:4] for text in axes.texts] == ["40 \N{RIGHTWARDS ARROW}", "dive", "-"]
    assert len(axes.containers) == 2
    assert axes.get_xlim()[1] < 3
    draw_panel(Figure().add_subplot(), "sgd", [summary("x", None), None])
