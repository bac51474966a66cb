"""Cost against width: the fits, the counts, and the command; no time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from mkor.bench import scaling_times
from mkor.bench.cli import main
from mkor.bench.scaling_fit import BOTH, FIT_FROM, SENT, fitted, make_curve, slope
from mkor.bench.scaling_times import (
    Method,
    count_sent,
    methods,
    numbers_sent,
    random_statistics,
    repeat,
    shape_of,
    time_parts,
    update_of,
)
from mkor.curvature.contract import SIDES

WIDTHS = [128, 256, 512, 1024, 2048, 4096]
BY_NAME = {method.name: method for method in methods()}


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.1, 3.0])
def test_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    values = [7e-6 * width**exponent for width in WIDTHS]
    assert slope(WIDTHS, values) == pytest.approx(exponent, abs=1e-12)


def test_slope_ignores_widths_below_the_least() -> None:
    values = [5.0, 5.0, *(width**2 for width in WIDTHS[2:])]
    assert slope(WIDTHS, values, 512) == pytest.approx(2)
    assert slope(WIDTHS, values) > 2.5


def test_slope_minimises_the_squares_of_the_logarithms() -> None:
    # Logarithms to base 2: (0, 0), (1, 2), (2, 1); the least-squares line has slope 1/2.
    assert slope([1, 2, 4], [1, 4, 2]) == pytest.approx(0.5)


def test_one_width_has_no_slope() -> None:
    curve = make_curve("x", "update", [256, 1024], [1.0, 2.0])
    assert curve.exponent is None
    assert curve.exponent_all == pytest.approx(0.5)


def test_fitted_line_goes_through_a_power_law_and_only_sees_what_counts() -> None:
    values = [99.0, 99.0, *(3.0 * width**1.5 for width in WIDTHS[2:])]
    curve = make_curve("x", "update", WIDTHS, values)
    for width in (FIT_FROM, 3000, 4096):
        assert fitted(curve, WIDTHS, width) == pytest.approx(3.0 * width**1.5)


@pytest.mark.parametrize("width", [3, 64])
def test_numbers_sent_are_those_of_the_formulas(width: int) -> None:
    # Per update beside the vectors: sums of squares of both sides, the scale, and rows per part.
    k = BY_NAME["window"].curvature.vectors
    sent = {name: numbers_sent(method.curvature, width) for name, method in BY_NAME.items()}
    assert sent["window"] == k * 2 * width + 3 + k
    assert sent["dense, paper"] == sent["Eva"] == 2 * width + 3 + 1
    assert sent["KFAC"] == 2 * width**2 + 2 * width + 3 + 1


def test_numbers_sent_grow_linearly_but_quadratically_for_kfac() -> None:
    found = {curve.method: curve for curve in count_sent(methods(), [512, 1024, 2048])}
    assert found.keys() == {"window", "dense, paper", "KFAC", "Eva"}
    assert {curve.part for curve in found.values()} == {SENT}
    for name, curve in found.items():
        assert curve.exponent == pytest.approx(2.0 if name == "KFAC" else 1.0, abs=5e-3)


@pytest.mark.parametrize(("name", "inverts"), [("KFAC", True), ("KFAC, no inverse", False)])
def test_kfac_is_timed_with_and_without_its_inverse(name: str, inverts: bool) -> None:
    method, shape = BY_NAME[name], shape_of(5)
    state = method.curvature.init(shape)
    update_of(method.curvature, state, random_statistics(method, 5))()
    assert torch.equal(state["left_inverse"][0], torch.eye(5)) != inverts
    assert not torch.equal(state["left_covariance"], torch.zeros(1, 5, 5))


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_statistics_are_complete_and_only_kfac_gets_covariances(method: Method) -> None:
    figures = random_statistics(method, 6)
    assert figures.vectors["left"].shape == (1, method.curvature.vectors, 6)
    assert figures.filled.all()
    assert figures.accept.all()
    assert set(figures.covariance) == (set(SIDES) if method.curvature.covariance else set())
    for S in figures.covariance.values():
        assert torch.linalg.eigvalsh(S.double()).min() > 0


def test_repeat_drops_the_first_run_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    # The runs take 100, 1, 2, ..., 9 s; 45 s are wanted, and no further run begins after them.
    clock, runs, resets = [0.0], [], []

    def work() -> None:
        clock[0] += len(runs) or 100
        runs.append(1)

    monkeypatch.setattr(scaling_times.time, "process_time", lambda: clock[0])
    timed = repeat(work, lambda: resets.append(1), 45.0)
    assert (timed.seconds, timed.repetitions) == (5.0, 9)
    assert len(runs) == len(resets) == 10


@pytest.mark.parametrize(("cost", "count"), [(1e9, scaling_times.FEWEST), (0, scaling_times.MOST)])
def test_repeat_has_limits(cost: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work() -> None:
        clock[0] += cost

    monkeypatch.setattr(scaling_times.time, "process_time", lambda: clock[0])
    assert repeat(work, lambda: None, 1.0).repetitions == count


def test_every_run_preconditions_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kind = type(BY_NAME["Eva"].curvature)
    apply = kind.apply

    def watched(self: object, prepared: object, W: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(W.clone())
        return apply(self, prepared, W, *rest)

    monkeypatch.setattr(kind, "apply", watched)
    parts = dict(time_parts(BY_NAME["Eva"], 4, 0.0))
    assert list(parts) == ["update", "precondition"]
    assert len(seen) == scaling_times.FEWEST + 1
    assert all(torch.equal(W, seen[0]) for W in seen)


def test_the_command_prints_and_stores_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling_times, "MOST", scaling_times.FEWEST)
    path = tmp_path / "scaling.json"
    arguments = ["overhead", "--scaling", "--widths", "16,8", "--quiet", "--json", str(path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for expected in ("KFAC, no inverse: update", "window: both", "numbers sent per update"):
        assert expected in shown
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["widths"] == [8, 16]
    assert stored["environment"]["packages"]["torch"]
    parts = {(curve["method"], curve["part"]) for curve in stored["curves"]}
    for name in ("window", "dense, paper", "KFAC", "Eva"):
        assert {(name, part) for part in ("update", "precondition", BOTH, SENT)} <= parts
    both = {c["part"]: c["values"] for c in stored["curves"] if c["method"] == "Eva"}
    summed = [a + b for a, b in zip(both["update"], both["precondition"], strict=True)]
    assert both[BOTH] == pytest.approx(summed)
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_has_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("FEWEST", "MOST"):
        monkeypatch.setattr(scaling_times, limit, 1)
    picture = tmp_path / "here.png"
    arguments = ["overhead", "--scaling", "--widths", "512,520", "--quiet", "--plot", str(picture)]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "8,16"], "goes with --scaling"),
        (["--plot", "no/such/x.png"], "no folder"),
        (["--scaling", "--rounds", "3"], "takes no rounds"),
        (["--scaling", "--width", "64"], "takes no width"),
        (["sgd", "--scaling"], "takes no contestants"),
        (["--scaling", "--json", "no/such/x.json"], "no folder"),
        (["--scaling", "--json", "."], "this is a folder"),
        (["--scaling", "--plot", "no/such/x.png"], "no folder"),
    ],
)
def test_wrong_requests_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["overhead", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "8,", "0", "8,x"])
def test_widths_are_whole_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["overhead", "--scaling", "--widths", text])
    assert "whole number" in capsys.readouterr().err
