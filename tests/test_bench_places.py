"""Where results go is checked before anything runs."""

import sys
from pathlib import Path

import pytest

from mkor.bench.errors import MissingExtraError, UsageError
from mkor.bench.places import prepare_file, prepare_folder, prepare_picture


def test_a_file_that_is_not_wanted_needs_no_place() -> None:
    assert prepare_file("--json", None) is None
    assert prepare_picture("--plot", None) is None
    assert prepare_folder(None) is None


def test_a_file_can_be_new_or_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert prepare_file("--json", str(path)) == path
    assert not path.exists()
    path.touch()
    assert prepare_file("--json", path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "this is a folder, name a file in it"), ("no/x.json", r"there is no folder .*no")],
)
def test_what_is_no_place_for_a_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    for prepare in (prepare_file, prepare_picture):
        with pytest.raises(UsageError, match=f"^--out .*: {message}"):
            prepare("--out", tmp_path / name)


@pytest.mark.parametrize("name", ["old.json", "new.json"])
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs this may be allowed everything, so the system's answer is put in its mouth.
    (tmp_path / "old.json").touch()
    asked = tmp_path / name if name == "old.json" else tmp_path
    monkeypatch.setattr("os.access", lambda path, mode: path != asked)
    with pytest.raises(UsageError, match="cannot be written"):
        prepare_file("--json", tmp_path / name)


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    assert prepare_picture("--plot", path) == path
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert prepare_file("--json", path) == path
    assert prepare_picture("--plot", None) is None
    with pytest.raises(MissingExtraError, match="--plot needs matplotlib"):
        prepare_picture("--plot", path)
    with pytest.raises(MissingExtraError, match="--out with its picture needs matplotlib"):
        prepare_folder(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_a_folder_is_made_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "inner"
    assert prepare_folder(str(folder)) == folder
    assert folder.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^--out .*file"):
        prepare_folder(str(tmp_path / "file"))
