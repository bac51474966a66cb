"""Half precision against float64: the measuring and the page, at tiny sizes."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mkor
from mkor.bench.drift import MEAN, NOISE, TURN, cast, drifting, gradient_of
from mkor.bench.precision import (
    OTHER_SCALES,
    PRECISIONS,
    SCALE,
    Copy,
    Setting,
    distance,
    follow,
    health_of,
    kinds,
    marks,
    reproduce,
)
from mkor.bench.precision_page import Point, error_table, is_mark
from mkor.bench.progress import Progress
from mkor.curvature.contract import Statistics

SCALES = {"left": 0.01, "right": 1.0}


def test_marks_are_spread_and_end_with_the_last() -> None:
    assert marks(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert marks(30) == [1, 2, 5, 10, 20, 30]
    assert [number for number in marks(30) if is_mark(number, 30)] == [1, 10, 30]


def test_distance_is_relative_to_the_reference() -> None:
    P, Q = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])
    assert distance(P, Q) == pytest.approx(0.75)
    assert distance(Q, P) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("diagonal", "positive"),
    [([1.0, 3.0], "yes"), ([1.0, -1e-9], "no"), ([1.0, 0.0], "unclear"), ([0.0, 0.0], "unclear")],
)
def test_health_tells_the_sign_of_the_smallest_eigenvalue(
    diagonal: list[float], positive: str
) -> None:
    health = health_of(torch.diag(torch.tensor(diagonal)))
    assert (health.finite, health.asymmetry, health.positive) == (True, 0.0, positive)
    assert health.smallest == pytest.approx(min(diagonal))
    assert health.largest == pytest.approx(max(diagonal))


def test_health_sees_asymmetry_and_what_is_not_finite() -> None:
    H = torch.eye(3, dtype=torch.float16)
    H[0, 2] = 0.25
    assert health_of(H).asymmetry == 0.25
    H[1, 1] = float("inf")
    assert not health_of(H).finite


def test_gradient_has_the_spectrum_that_is_promised() -> None:
    values = torch.linalg.svdvals(gradient_of(12, 0)[0])
    wanted = 1 / torch.arange(1, 13, dtype=torch.float64)
    torch.testing.assert_close(values / values[0], wanted)
    assert float(values.norm()) == pytest.approx(1)


def drift(count: int, curvature: object = None, width: int = 400) -> list[Statistics]:
    source = drifting(curvature or mkor.DenseInverse(), width, SCALES, seed=3)
    return list(islice(source, count))


def test_statistics_repeat_and_number_themselves() -> None:
    first, second = drift(3), drift(3)
    assert [statistics.update for statistics in first] == [0, 1, 2]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.vectors["left"], other.vectors["left"])
    assert not torch.equal(first[0].vectors["left"], first[1].vectors["left"])


def test_mean_square_is_that_of_single_rows() -> None:
    rows = mkor.Window(rank=600, vectors=600, rows=1)
    statistics = drift(1, rows)[0]
    for side, scale in SCALES.items():
        declared = float(statistics.mean_square[side])
        assert declared == pytest.approx(scale**2 * (MEAN**2 + 1 + NOISE**2))
        assert float(statistics.vectors[side].square().mean()) == pytest.approx(declared, rel=0.2)


def test_the_mean_turns_slowly() -> None:
    vectors = torch.cat([statistics.vectors["right"][:, 0] for statistics in drift(60)])
    cosines = torch.nn.functional.cosine_similarity(vectors[:1], vectors)
    assert float(cosines[1]) == pytest.approx((1 - TURN**2) ** 0.5, abs=0.02)
    assert float(cosines[-1]) == pytest.approx((1 - TURN**2) ** 29.5, abs=0.15)


def test_cast_changes_numbers_but_not_which_are_there() -> None:
    statistics = drift(2)[1]
    low = cast(statistics, torch.float32)
    assert low.vectors["left"].dtype == low.mean_square["left"].dtype == torch.float32
    assert low.filled is statistics.filled
    assert low.update == 1


@pytest.mark.parametrize("kind", kinds())
def test_each_copy_stores_its_factors_as_its_name_says(kind: str) -> None:
    for precision, (dtype, stored) in PRECISIONS.items():
        copy = Copy(precision, kinds()[kind], 4)
        key = "left_rows" if kind == "window" else "left_inverse"
        assert copy.state[key].dtype == (stored or dtype) == getattr(torch, precision)


@pytest.mark.parametrize("kind", kinds())
def test_errors_are_those_of_the_precision(kind: str) -> None:
    points = follow(Setting(kind, kinds()[kind], 24, updates=20), Progress())
    assert {point.updates for point in points} == set(marks(20))
    error = {(point.precision, point.updates): point.error for point in points}
    for updates in marks(20):
        assert error["float64", updates] == 0
        assert error["float32", updates] < 1e-5
        for precision in ("bfloat16", "float16"):
            unit = torch.finfo(getattr(torch, precision)).eps
            assert 0.01 * unit < error[precision, updates] < 20 * unit
    judged = {point.updates for point in points if point.health}
    assert judged == (set() if kind == "window" else {1, 10, 20})


def test_a_refused_gradient_is_no_number() -> None:
    copy = Copy("float16", kinds()["dense, release"], 4)
    copy.state["left_inverse"].fill_(float("inf"))
    assert copy.precondition(gradient_of(4, 0)).isnan().all()
    assert not copy.health()["left"].finite
    assert copy.health()["right"].positive == "yes"


def test_preconditioning_leaves_the_gradient() -> None:
    gradient: Tensor = gradient_of(4, 0)
    before = gradient.clone()
    copy = Copy("float64", kinds()["dense, release"], 4)
    copy.state["left_inverse"].mul_(2)
    torch.testing.assert_close(copy.precondition(gradient), 2 * before)
    assert torch.equal(gradient, before)


def test_error_table_has_a_row_per_factor_and_a_column_per_mark() -> None:
    points = [
        Point("window", 8, precision, SCALE, updates, error, 10 * error, None)
        for precision, error in (("float32", 1e-7), ("float16", float("nan")))
        for updates in (1, 10)
    ]
    lines = error_table(points).splitlines()
    assert lines[0] == "| factors | stored in | 1 | 10 | rescaled |"
    assert lines[2] == "| window | float32 | 1.0e-07 | 1.0e-07 | 1.0e-06 |"
    assert lines[3] == "| window | float16 | - | - | - |"


def refuse_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_reproduce_writes_all_files_and_keeps_prose(tmp_path: Path) -> None:
    progress = Progress()
    reproduce(tmp_path, progress, widths=(6, 8), updates=4)
    assert progress.done == progress.total
    page = tmp_path / "precision.md"
    first = page.read_text(encoding="utf-8")
    assert "### Width 6" in first
    assert "### Width 8" in first
    assert "| dense, paper | bfloat16 |" in first
    page.write_text(f"{first}\nMy own words.\n", encoding="utf-8")
    reproduce(tmp_path, Progress(), widths=(6,), updates=2)
    second = page.read_text(encoding="utf-8")
    assert second.endswith("\nMy own words.\n")
    assert "### Width 6" in second
    assert "### Width 8" not in second
    stored = json.loads(
        (tmp_path / "precision.json").read_text(encoding="utf-8"), parse_constant=refuse_constants
    )
    runs = [1 + len(OTHER_SCALES), len(kinds()), len(PRECISIONS), len(marks(2))]
    assert len(stored["points"]) == math.prod(runs)
    assert stored["environment"]["packages"]["torch"]
    assert (tmp_path / "precision.png").read_bytes()[:4] == b"\x89PNG"
