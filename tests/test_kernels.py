"""The benchmark of kernels times each version, and torch's operators, and leaves the best."""

import json

import kernels
import pytest

from mkor import native


def test_tiny_run(tmp_path):
    before = native.version()
    assert kernels.main(["--width", "16", "--rounds", "3", "--out", str(tmp_path)]) == 0
    assert native.version() == before
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["environment"]["kernels"] == before
    assert len(record["kernels"]) == 5
    for times in record["kernels"].values():
        assert list(times) == kernels.versions()
        assert all(0 < low <= median <= high for low, median, high in times.values())


@pytest.mark.parametrize("version", kernels.versions())
def test_each_runs_what_it_says(version):
    before, ran = native.version(), []
    kernels.run_as(version, lambda: ran.append(native.version()))
    assert ran == [None if version == kernels.TORCH else version]
    with pytest.raises(ZeroDivisionError):
        kernels.run_as(version, lambda: 1 / 0)
    assert native.version() == before


def test_a_place_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--out", str(tmp_path / "file")])
    assert "--out" in capsys.readouterr().err
