"""``benchmarks/costs.py``: what it runs, keeps, says and draws; no time is asserted."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import costs
import costs_figures
import costs_page
import costs_picture
import costs_rows
import costs_runs
import pytest
from costs_rows import (
    BASE,
    DENSE_1,
    DENSE_10,
    EVA,
    HALF,
    KFAC_1,
    KFAC_10,
    KFAC_50,
    MKOR,
    SELDOM,
    SMALL,
    SOAP,
    SOAP_1,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mkor.bench.contestants import parse_contestant
from mkor.bench.optimizers import base_defaults, check_names
from mkor.bench.overhead_models import MODELS, model_subject
from mkor.bench.tables import bytes_text
from mkor.bench.worker import Worker

FILE = Path(costs.__file__)
STEPS = (-0.03, 0.02, 0.0, 0.03, -0.02)
"""By how much the rounds of hand-made files differ, in their order; quartiles are the second."""
LOW, HIGH = -0.02, 0.02

Record = dict[str, Any]
Ratio = float | tuple[float, float]


# ------------------------------------------------------------------------------ hand-made files


def timing_of(label: str, ratio: Ratio, rounds: int, warmup: int, extra: float) -> Record:
    """A contestant that takes so many times a second; of two ratios the second is the rare one."""
    usual, rare = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    noise = itertools.cycle(STEPS if label != "adamw" else (0.0,))
    samples = [
        (rare if (warmup + index) % 10 == 0 else usual) + next(noise) for index in range(rounds)
    ]
    return {
        "contestant": label,
        "cpu_ms": 1e3 * usual,
        "wall_ms": 1.01e3 * usual,
        "ratio": statistics.median(samples),
        "low": usual + LOW if label != "adamw" else 1.0,
        "high": usual + HIGH if label != "adamw" else 1.0,
        "mean_ratio": statistics.fmean(samples),
        "wall_ratio": usual,
        "state_bytes": 2_500_000,
        "extra_memory": extra,
        "buffer_bytes": 200_000,
        "parts_ms": {"step": 1.0},
        "cpu_samples": samples,
        "wall_samples": samples,
        "parts_wall_ms": {"step": 1.0},
        "page_faults": 0,
        "counts": {
            "operators": 1234.0,
            "operators_in": {},
            "kernels": 0.0,
            "own_calls": 12.0,
            "allocations": 567.0,
            "allocated_bytes": 8e6,
            "peak_bytes": 7e6,
            "slowest": [],
        },
    }


LIMIT = {
    "part": "mkor.update",
    "bytes": 3000.0,
    "operations": 5e6,
    "calls": 12.0,
    "bytes_ms": 0.25,
    "operations_ms": 0.125,
    "calls_ms": 0.05,
    "measured_ms": 0.5,
    "near": 0.5,
}


def write(
    folder: Path,
    name: str,
    ratio: Mapping[str, Ratio],
    *,
    memory: Mapping[str, float] | None = None,
    rounds: int = 10,
    runs: Sequence[int] = (0, 1),
    cpu: str = "a processor",
) -> None:
    """The files of a row as `mkor overhead` writes them; 1.5 for those who are not named."""
    row = costs_rows.ROWS[name]
    for index, (run, file) in enumerate(row.files()):
        if index not in runs:
            continue
        timings = [
            timing_of(
                label,
                1.0 if label == "adamw" else ratio.get(label, 1.5),
                rounds,
                run.warmup,
                (memory or {}).get(label, 0.0),
            )
            for label in run.contestants
        ]
        record = {
            "format": 1,
            "model": {"name": row.model, "sizes": row.sizes},
            "rounds": rounds,
            "device": "cpu",
            "autocast": None,
            "memory_kept": True,
            "environment": {
                "date": "2030-01-02",
                "python": "3.99",
                "packages": {"mkor": "0.1.0", "torch": "2.99", "numpy": None},
                "platform": "Linux x86_64",
                "cpu": cpu,
                "cores": 2,
                "threads": 1,
            },
            "timings": timings,
            "machine": {"bandwidth": {"65536": 5e10, "1": 1e10}, "operations": 1e11, "call": 1e-6},
            "limits": {"mkor+adamw": [LIMIT]} if run.limits else {},
            "warmup": run.warmup,
            "profiled": run.profiled,
        }
        (folder / file).write_text(json.dumps(record))


def everything() -> list[str]:
    return [row.name for row in costs_rows.ALL if not row.asked_for]


def write_all(folder: Path, **ratios: Mapping[str, Ratio]) -> None:
    """All rows, by their names with underscores; memory at 3% and, in half precision, 1.5%."""
    memory = {MKOR: 0.03, HALF: 0.015}
    for name in everything():
        write(folder, name, ratios.get(name.replace("-", "_"), {MKOR: 1.03}), memory=memory)


def page_of(folder: Path) -> str:
    """What `--page-only` writes, without the picture."""
    everything = costs_figures.read_all(costs_rows.ALL, folder)
    text: str = costs_page.page(everything, costs.command_of(str(folder), tiny=False), tiny=False)
    return text


def cells_of(text: str, heading: str, first: str) -> list[list[str]]:
    """The lines of a section's tables that begin so."""
    section = text.split(f"# {heading}\n")[1].split("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines if line[0].startswith(first)]


def row_of(folder: Path, name: str) -> Any:
    (found,) = (
        each for each in costs_figures.read_all(costs_rows.ALL, folder) if each.row.name == name
    )
    return found


# ------------------------------------------------------------------------------------- the plan


def all_runs() -> list[Any]:
    return [pytest.param(row, run, id=file) for row in costs_rows.ALL for run, file in row.files()]


@pytest.mark.parametrize(("row", "run"), all_runs())
def test_runs_are_of_what_there_is(row: Any, run: Any) -> None:
    assert row.sizes.keys() == MODELS[row.model].sizes.keys()
    assert run.contestants[:2] == ("adamw", "mkor+adamw")
    assert len(set(run.contestants)) == len(run.contestants)
    for label in run.contestants:
        check_names(parse_contestant(label))
        cycle = costs_figures.cycle_of(label)
        seen = {costs_figures.is_rare(index, run.warmup, cycle) for index in range(run.rounds)}
        # No memory is measured by the clock.
        assert seen == ({True} if cycle == 1 else {True, False}) or not row.drawn


def test_bars_are_about_runs_with_many_rounds_and_few_contestants() -> None:
    for bar in costs_rows.BARS:
        run = costs_rows.ROWS[bar.row].runs[0]
        assert bar.contestant in run.contestants
        assert bar.figure == "extra_memory" or run.rounds >= 30
        assert len(run.contestants) <= 3
    assert all(row.runs[0].limits for row in costs_rows.ALL if row.drawn)


@pytest.mark.parametrize(
    "label",
    ["mkor[update_every=3]+adamw", "kfac[inverse_every=3]+adamw", "soap[precondition_frequency=3]"],
)
def test_rare_work_falls_on_the_rounds_that_are_named(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmup = 2
    assert costs_figures.cycle_of(label) == 3
    subject = model_subject("mlp", {"width": 8, "depth": 2, "rows": 12})
    worker = Worker(parse_contestant(label), subject)
    monkeypatch.setattr(Worker, "warmup_rounds", warmup)
    worker.warm_up()
    for _ in range(7):
        worker.profile()
    calls = [each.operators.total() for each in worker.profiles]
    rare = [costs_figures.is_rare(index, warmup, 3) for index in range(7)]
    assert rare == [False, True, False, False, True, False, False]
    assert [each > min(calls) for each in calls] == rare


def test_soap_decomposes_as_seldom_as_its_package_has_it() -> None:
    default = base_defaults(parse_contestant(SOAP).base)["precondition_frequency"]
    assert (costs_figures.cycle_of(SOAP), costs_figures.cycle_of(SOAP_1)) == (
        default,
        1,
    )


# ------------------------------------------------------------------------------------- the page


def test_bars_are_met_or_not(tmp_path: Path) -> None:
    write_all(
        tmp_path,
        mlp_512_4096={MKOR: 1.04},
        mlp_1024_4096={MKOR: 1.0404},
        mlp_64_64={MKOR: 2.5, SMALL: 1.61},
    )
    write(tmp_path, "memory", {}, memory={MKOR: 0.034, HALF: 0.0181})
    small, half = "`mkor[rank=16]+adamw`", "`mkor[factor_dtype=bfloat16]+adamw`"
    header, _, *found = cells_of(page_of(tmp_path), "The bars", "")
    assert header[1:5] == ["who", "bar", "arithmetic alone", "measured"]
    assert [cells[1:] for cells in found[:-1]] == [
        ["`mkor+adamw`", "1.04", "", "1.040 (1.020-1.060)", "met"],
        ["`mkor+adamw`", "1.04", "", "1.0404 (1.020-1.060)", "**not met**"],
        ["`mkor+adamw`", "1.06", "", "1.030 (1.010-1.050)", "met"],
        ["`mkor+adamw`", "1.15", "1.09", "1.030 (1.010-1.050)", "met"],
        ["`mkor+adamw`", "2.6", "2.33", "2.500 (2.480-2.520)", "met"],
        [small, "1.6", "1.33", "1.610 (1.590-1.630)", "**not met**"],
        ["`mkor+adamw`", "3.4%", "", "3.4%", "met"],
        [half, "1.8%", "", "1.81%", "**not met**"],
        ["`mkor+adamw`", "1.08", "", "1.030 (1.010-1.050)", "met"],
        ["`mkor+adamw`", "1.07", "", "1.030 (1.010-1.050)", "met"],
    ]
    assert [found[index][0] for index in (0, 1, 6, 9)] == [
        "time, mlp: width 512, depth 4, rows 4,096",
        "time, mlp: width 1,024, depth 4, rows 4,096",
        "memory, mlp: width 1,024, depth 4, rows 256",
        "time, bert-base-block: width 768, depth 1, batch 4, context 512",
    ]


def test_bars_are_about_the_first_run(tmp_path: Path) -> None:
    write(tmp_path, "conv-net", {MKOR: 1.02}, runs=[0])
    write(tmp_path, "conv-net", {MKOR: 1.6}, runs=[1])
    text = page_of(tmp_path)
    assert cells_of(text, "The bars", "time, conv-net")[0][-2:] == ["1.020 (1.000-1.040)", "met"]
    assert cells_of(text, "conv-net", "`mkor+adamw`")[0][3] == "1.020 (1.000-1.040)"
    # The others take 1.5 times as long, in the same run.
    against = cells_of(text, "Against the others", "conv-net")[0]
    assert (against[1], against[5]) == ("1.600", "**no**")
    assert "there `mkor+adamw` took 1.600 (1.580-1.620)" in text
    (tmp_path / "conv-net.json").unlink()
    text = page_of(tmp_path)
    assert cells_of(text, "The bars", "time, conv-net")[0][-2:] == ["", "not measured"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    for name in ("mlp-256-4096.json", "conv-net.json", "conv-net-others.json", "memory.json"):
        (tmp_path / name).unlink()
    text = page_of(tmp_path)
    missing = "mlp-256-4096.json, conv-net.json, conv-net-others.json, memory.json"
    assert f"Not measured: {missing}." in text
    assert "**Not measured**: conv-net.json, conv-net-others.json." in text
    verdicts = [cells[-1] for cells in cells_of(text, "The bars", "")[2:]]
    unknown = [index for index, each in enumerate(verdicts) if each == "not measured"]
    assert unknown == [2, 6, 7, 8, 10]
    assert cells_of(text, "The bars", "cheaper")[0][-2] == "in 9 of 10 rows; not measured: conv-net"
    assert cells_of(text, "Against the others", "conv-net")[0][5] == "not measured"
    # Nobody asks for this one, so it is not missed.
    assert "transformer-2048" not in text
    write(tmp_path, "transformer-2048", {}, runs=[0])
    assert "transformer-2048-others.json" in page_of(tmp_path)


def test_files_of_something_else_do_not_count(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "conv-net.json"
    good = json.loads(path.read_text())
    for spoil in (
        {"model": {"name": "conv-net", "sizes": {"width": 4, "depth": 3, "batch": 64}}},
        {"timings": good["timings"][:1]},
    ):
        path.write_text(json.dumps(good | spoil))
        assert row_of(tmp_path, "conv-net").missing == ["conv-net.json"]
    path.write_text("{")
    assert row_of(tmp_path, "conv-net").missing == ["conv-net.json"]
    path.write_text(json.dumps(good))
    assert row_of(tmp_path, "conv-net").missing == []


def test_rare_work_is_averaged_over_its_cycle(tmp_path: Path) -> None:
    """The sixth of ten rounds has it: 4 - 0.03; the median of the others is 2."""
    ratio: dict[str, Ratio] = {
        KFAC_10: (2.0, 4.0),
        DENSE_10: (1.2, 1.7),
        SOAP: (1.6, 9.0),
    }
    write(tmp_path, "transformer-64", ratio)
    found = row_of(tmp_path, "transformer-64").found
    assert found[KFAC_10].ends == pytest.approx((2.0, 3.97))
    assert found[KFAC_10].ratio == pytest.approx((9 * 2.0 + 3.97) / 10)
    assert found[KFAC_50].ratio == pytest.approx((49 * 2.0 + 3.97) / 50)
    assert found[KFAC_1].ratio == pytest.approx(3.97)
    assert found[DENSE_1].ratio == pytest.approx(1.67)
    assert found[MKOR].ratio == found[MKOR].timing["ratio"] == pytest.approx(1.5)
    text = page_of(tmp_path)
    soap = row_of(tmp_path, "transformer-64").beside[SOAP_1]
    assert (soap.source, soap.ratio) == (SOAP, pytest.approx(8.97))
    assert cells_of(text, "Against the others", "transformer-64")[0][6] == "8.970"
    rows = {cells[0]: cells for cells in cells_of(text, "transformer-64", "`")}
    assert rows[f"`{KFAC_10}`"][3:5] == ["2.010 (1.980-2.020)", "2.197"]
    assert rows[f"`{KFAC_50}`, computed"][2:6] == ["", "", "2.039", ""]
    assert rows[f"`{MKOR}`"][4] == ""
    order = [label.split("`")[1] for label in rows]
    assert order == [each for each in [BASE, *costs_rows.LOOKS] if each in order]


def test_what_was_measured_is_not_computed(tmp_path: Path) -> None:
    ratio: dict[str, Ratio] = {KFAC_1: 3.5, KFAC_10: (2.0, 4.0)}
    write(tmp_path, "mlp-512-1024", ratio)
    found = row_of(tmp_path, "mlp-512-1024").found
    assert (found[KFAC_1].source, found[KFAC_1].ratio) == (
        "",
        pytest.approx(3.5),
    )
    assert found[KFAC_50].source == KFAC_10


def test_rounds_that_miss_the_rare_work_say_so(tmp_path: Path) -> None:
    write(tmp_path, "conv-net", {SOAP: (2.0, 4.0), MKOR: 1.1}, rounds=5)
    found = row_of(tmp_path, "conv-net")
    assert found.found[SOAP].ratio is None
    assert KFAC_50 not in found.found
    text = page_of(tmp_path)
    assert cells_of(text, "conv-net", "`soap`")[0][4] == "not seen"
    assert cells_of(text, "Against the others", "conv-net")[0][3:6] == ["", "", "not measured"]


@pytest.mark.parametrize("rival", [SOAP, KFAC_10, DENSE_10])
def test_one_that_is_cheaper_is_told(tmp_path: Path, rival: str) -> None:
    """Each at every step: KFAC and DenseMKOR by their rounds with the rare work."""
    write_all(tmp_path, conv_net={MKOR: 1.4, rival: (1.1, 1.6)})
    bar = cells_of(page_of(tmp_path), "The bars", "cheaper")[0]
    cheaper = rival == SOAP
    assert bar[-1] == ("**not met**" if cheaper else "met")
    assert ("not in conv-net" in bar[-2]) is cheaper
    write(tmp_path, "conv-net", {MKOR: 1.4, rival: (1.1, 1.3)})
    text = page_of(tmp_path)
    told = cells_of(text, "The bars", "cheaper")[0][-2:]
    assert told == ["in 9 of 10 rows; not in conv-net", "**not met**"]
    verdicts = {cells[0]: cells[5] for cells in cells_of(text, "Against the others", "")[2:]}
    assert [name for name, each in verdicts.items() if each == "**no**"] == ["conv-net"]
    assert verdicts["mlp-64-64"] == "yes"


def test_the_distance_to_eva_is_taken_round_by_round(tmp_path: Path) -> None:
    write(tmp_path, "conv-net", {MKOR: 1.2, EVA: 1.0})
    path = tmp_path / "conv-net-others.json"
    record = json.loads(path.read_text())
    samples = {each["contestant"]: each["cpu_samples"] for each in record["timings"]}
    # Each round of both is slower than the one before it; their quotients are not.
    samples[EVA][:] = [float(index + 1) for index in range(10)]
    samples[MKOR][:] = [1.1 * (index + 1) for index in range(9)] + [30.0]
    path.write_text(json.dumps(record))
    found = cells_of(page_of(tmp_path), "Against the others", "conv-net")[0]
    assert found[-1] == "1.100 (1.100-1.100)"


def test_the_limits_stand_beside_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path, "conv-net", {}, runs=[0])
    found = cells_of(page_of(tmp_path), "conv-net", "update")
    assert found == [["update", "3 kB", "0.25", "5", "0.125", "12", "0.05", "0.5", "50%"]]
    assert "operations at 100 Gflop/s, calls at 1 us" in page_of(tmp_path)


def test_the_page_says_how_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)
    write(tmp_path, "conv-net", {}, cpu="another")
    text = page_of(tmp_path)
    assert "`python benchmarks/costs.py --out FOLDER`" in text
    assert str(tmp_path) not in text
    assert text.count("On a processor, 2 cores, 1 thread(s) in use") == 1
    assert text.count("On another, 2 cores") == 1
    assert "Python 3.99, mkor 0.1.0, torch 2.99; 2030-01-02." in text
    words = "--model conv-net --width 16 --depth 3 --batch 64 --rounds 10 --limits"
    assert f"`mkor overhead 'adamw,mkor+adamw' {words}`" in text
    assert "AdamW's wall time over its CPU time 1.01" in text
    monkeypatch.chdir(tmp_path.parent)
    assert f"--out {tmp_path.name}`" in page_of(Path(tmp_path.name))


# ---------------------------------------------------------------------------------- the picture


def panel() -> Any:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    return axes


def test_the_picture_shows_figures_and_bars(tmp_path: Path) -> None:
    ratio: dict[str, Ratio] = {
        MKOR: 2.7,
        SMALL: 1.5,
        SOAP: (2.0, 4.0),
        KFAC_1: 12.34,
    }
    write(tmp_path, "mlp-64-64", ratio)
    axes, lanes = panel(), {label: index for index, label in enumerate(costs_rows.LOOKS)}
    costs_picture.draw_panel(axes, row_of(tmp_path, "mlp-64-64"), lanes)
    found = {text.xy[1]: text for text in axes.texts if hasattr(text, "xy")}
    texts = {label: found[lane].get_text() for label, lane in lanes.items()}
    assert texts[MKOR] == "2.700 > 2.6"
    assert texts[SMALL] == "1.500 ≤ 1.6"
    assert texts[SOAP] == "2.20"
    assert texts[KFAC_1] == "12.3"
    inks = {label: to_hex(found[lane].get_color()).upper() for label, lane in lanes.items()}
    assert (inks[MKOR], inks[SMALL]) == (
        costs_picture.BAD,
        costs_picture.GOOD,
    )
    black = [line for line in axes.lines if line.get_color() == "black"]
    assert {line.get_xdata()[0] for line in black} == {2.6, 1.6}
    dots = {line.get_ydata()[0]: line for line in axes.lines if line.get_marker() == "o"}
    ways = {label: dots[lane].get_markerfacecolor() for label, lane in lanes.items()}
    hollow = [label for label, face in ways.items() if face == "white"]
    assert hollow == [
        SELDOM,
        DENSE_10,
        KFAC_10,
        KFAC_50,
    ]
    colours = {label: dots[lane].get_color() for label, lane in lanes.items()}
    assert colours == {label: look[1] for label, look in costs_rows.LOOKS.items()}
    (tmp_path / "mlp-64-64.json").unlink()
    axes = panel()
    costs_picture.draw_panel(axes, row_of(tmp_path, "mlp-64-64"), lanes)
    assert "2.70" in [text.get_text() for text in axes.texts]
    assert "black" not in [line.get_color() for line in axes.lines]


def test_a_panel_says_that_nothing_was_measured(tmp_path: Path) -> None:
    axes = panel()
    costs_picture.draw_panel(axes, row_of(tmp_path, "conv-net"), {})
    assert "not measured" in [text.get_text() for text in axes.texts]


def test_all_panels_share_an_axis_that_holds_everything(tmp_path: Path) -> None:
    write(tmp_path, "mlp-64-64", {MKOR: 0.5, KFAC_10: (2.0, 40.0)})
    low, high = costs_picture.limits_of(costs_figures.read_all(costs_rows.ALL, tmp_path))
    assert low < 0.5 - 0.03
    assert high > 40


# -------------------------------------------------------------------------------- the command line


@pytest.fixture(name="measured")
def _measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured; its files appear as if it had been."""
    seen: list[str] = []

    def measure(row: Any, run: Any, path: Path, *, quiet: bool) -> bool:
        seen.append(path.name)
        write(path.parent, row.name, {MKOR: 1.01}, runs=[row.runs.index(run)])
        return True

    monkeypatch.setattr(costs_runs, "measure", measure)
    monkeypatch.setattr(costs, "draw", lambda *_: None)
    return seen


def test_everything_is_measured_unless_it_is_named(measured: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "new")]
    assert costs.main(out) == 0
    files = [file for row in costs_rows.ALL if not row.asked_for for _, file in row.files()]
    assert measured == files
    assert len(set(files)) == len(files) == 21
    measured.clear()
    assert costs.main([*out, "--rows", "conv-net,transformer-2048"]) == 0
    assert measured == [
        "conv-net.json",
        "conv-net-others.json",
        "transformer-2048.json",
        "transformer-2048-others.json",
    ]


def test_resuming_skips_what_is_there(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--rows", "conv-net,memory"]
    write(tmp_path, "conv-net", {MKOR: 1.25}, runs=[0])
    assert costs.main([*words, "--resume"]) == 0
    assert measured == ["conv-net-others.json", "memory.json"]
    told = capsys.readouterr().err
    assert "conv-net.json is there already" in told
    assert "[1/2] conv-net: width 16, depth 3, batch 64; 7 contestants, 15 rounds;" in told
    assert "time, conv-net" in (text := (tmp_path / "costs.md").read_text())
    assert "1.250 (1.230-1.270) | **not met**" in text
    measured.clear()
    # Of another subject, and where nobody asks for what is there.
    record = json.loads((tmp_path / "memory.json").read_text())
    record["model"]["sizes"]["rows"] = 7
    (tmp_path / "memory.json").write_text(json.dumps(record))
    assert costs.main([*words, "--resume"]) == 0
    assert measured == ["memory.json"]
    assert costs.main(words) == 0
    assert measured[1:] == ["conv-net.json", "conv-net-others.json", "memory.json"]


def test_the_page_alone_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs_runs, "measure", lambda *_, **__: pytest.fail("it measured"))
    write_all(tmp_path)
    (tmp_path / "costs.md").write_text("spoilt")
    assert costs.main(["--out", str(tmp_path), "--page-only"]) == 0
    assert (tmp_path / "costs.md").read_text(encoding="utf-8") == page_of(tmp_path)
    assert (tmp_path / "costs.png").stat().st_size > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["conv-net", "mkor+adamw", "1.08", "1.030", "(1.010-1.050)", "met"] in lines


def run_with(status: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lets processes end at once."""
    commands: list[list[str]] = []
    monkeypatch.setattr(costs, "draw", lambda *_: None)

    def run(command: list[str], **how: Any) -> Any:
        commands.append(command)
        assert how["env"]["OMP_NUM_THREADS"] == "1"
        Path(command[command.index("--json") + 1]).write_text("{")
        return costs_runs.subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(costs_runs.subprocess, "run", run)
    return commands


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = run_with(2, monkeypatch)
    words = ["--out", str(tmp_path), "--rows", "conv-net", "--rounds", "7"]
    assert costs.main(words) == 1
    assert "conv-net: mkor overhead ended with 2" in capsys.readouterr().err
    assert [command[command.index("--rounds") + 1] for command in commands] == ["7", "7"]
    assert ["--limits" in command for command in commands] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["costs.md"]


def test_an_interruption_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "mlp-64-64", {MKOR: 2.0})
    commands = run_with(130, monkeypatch)
    assert costs.main(["--out", str(tmp_path), "--rows", "conv-net,memory"]) == 130
    assert len(commands) == 1
    assert "interrupted" in capsys.readouterr().err
    assert "2.000 (1.980-2.020) | met" in (tmp_path / "costs.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "mlp-512-496"], "unknown row 'mlp-512-496'. Did you mean 'mlp-512-4096'?"),
        (["--rows", "nothing"], "Choose from: mlp-512-4096, mlp-1024-4096,"),
        (["--rows", ","], "write names separated by commas"),
        (["--rounds", "0"], "'0' is no whole number from 1 up"),
    ],
)
def test_a_wrong_request_is_told_before_anything_runs(
    words: list[str],
    message: str,
    measured: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = costs.main(["--out", str(tmp_path), *words])
    except SystemExit as refused:
        status = int(str(refused.code))
    assert status == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert measured == []
    assert list(tmp_path.iterdir()) == []


def test_a_row_from_its_process_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = costs_rows.ROWS["memory"]
    run = replace(row.runs[0], limits=True)
    monkeypatch.setitem(costs_rows.ROWS, "memory", replace(row, runs=(run,)))
    monkeypatch.setattr(costs, "draw", lambda _, path: path.touch())
    words = ["--out", str(tmp_path), "--rows", "memory", "--tiny", "--quiet"]
    assert costs.main(words) == 0
    (text,) = (path.read_text() for path in tmp_path.glob("*.json"))
    record = json.loads(text)
    assert str(FILE.parent.parent) not in text
    assert (record["rounds"], record["warmup"], record["profiled"]) == (2, 1, 1)
    assert record["model"] == {"name": "mlp", "sizes": {"width": 16, "depth": 2, "rows": 32}}
    assert record["environment"]["threads"] == 1
    _, whole, half = record["timings"]
    assert len(whole["cpu_samples"]) == 2
    assert 0 < half["extra_memory"] < whole["extra_memory"]
    page = (tmp_path / "costs.md").read_text()
    assert "--tiny`" in page
    assert "A trial at tiny sizes" in page
    (cells,) = cells_of(page, "memory", "`mkor[factor_dtype")
    assert cells[7] == f"{half['extra_memory']:.2%}"
    assert cells[8] == bytes_text(half["buffer_bytes"])
    assert cells[10] == f"{half['counts']['operators']:,.0f}"
    assert cells[11] == f"{half['counts']['own_calls']:,.0f}"
    assert [line[0] for line in cells_of(page, "memory", "") if len(line) == 9][2:] == [
        limit["part"].removeprefix("mkor.") for limit in record["limits"]["mkor+adamw"]
    ]
    assert (tmp_path / "costs.png").exists()
    told = capsys.readouterr()
    assert f"memory: mkor+adamw {whole['ratio']:.3f}" in told.out
    # Files at tiny sizes are not those that the bars are about.
    assert "**Not measured**: memory.json." in page_of(tmp_path)
