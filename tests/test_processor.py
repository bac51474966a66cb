"""The benchmark of small operators runs, and its figures are what it says they are."""

import json

import processor
import pytest


def test_tiny_run(tmp_path):
    assert processor.main(["--tiny", "--rounds", "3", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "processor.json").read_text())
    assert [row["width"] for row in record["products"]] == [processor.TINY]
    for row in record["operators"]:
        assert 0 < row["in_a_loop"][0] <= row["in_a_loop"][1] <= row["in_a_loop"][2]
        assert len(row["after"]) == 3
    assert len(record["product_after"]) == 3


def test_speed_is_operations_over_time(monkeypatch):
    """64 rows in a tenth of the time of 640 are as fast."""
    times = {"window": (0.0, 1.0, 0.0), "large": (0.0, 10.0, 0.0)}
    monkeypatch.setattr(processor, "in_turn", lambda *_: times)
    assert processor.products([640], 3)[0]["speed"] == pytest.approx(1.0)


def test_only_the_second_of_a_pair_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(processor, "seconds", lambda work: work() or 1.0)
    pairs = {"a": (lambda: order.append("before"), lambda: order.append("work"))}
    assert processor.in_turn(pairs, 3) == {"a": (1.0, 1.0, 1.0)}
    assert order == ["before", "work"] * 5


def test_a_place_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        processor.main(["--out", str(tmp_path / "file")])
    assert "--out" in capsys.readouterr().err
