"""The command line as a user meets it: help, wrong requests, where results go, inspection."""

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mkor.bench.cli import UsageError, main, prepare_file, prepare_folder, prepare_picture
from mkor.bench.show import Progress

SMALL = ["digits-mlp", "--width", "16", "--depth", "2", "--batch", "16", "--quiet"]
RACE = [*SMALL, "--steps", "6", "--seeds", "2"]
HEAVY = ("torch", "matplotlib", "sklearn", "rich", "numpy", "pytorch_optimizer")


def compare(*arguments: str) -> int:
    task, *rest = RACE
    return main(["compare", task, "adamw,sgd", *rest, *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from mkor.bench.cli import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mkor" in done.stdout


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkor", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "compare" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_who_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "mkor", "compare", "digits-mlp", "sgd", *RACE[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "overhead" in capsys.readouterr().out


def test_compare_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert compare("--out", str(out), "--lr", "sgd=0.05", "--baseline", "sgd") == 0
    text = capsys.readouterr()
    assert "ratios are to sgd" in text.out
    assert "sgd uses lr 0.05" in text.out
    assert text.err == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text.out)
    assert {path.name for path in out.iterdir()} == {"curves.png", "curves.csv", "results.json"}
    assert json.loads((out / "results.json").read_text())["settings"]["rates"] == {"sgd": 0.05}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "texts"], "unknown task 'texts'. Did you mean 'text-lm'"),
        (["compare", "digits-mlp", "adamv"], "Did you mean 'adamw'"),
        (["compare", "digits-mlp", "mkor[rnk=1]+sgd"], "Did you mean 'rank'"),
        (["compare", "digits-mlp", "sgd", "--baseline", "sgdd"], "Did you mean 'sgd'"),
        (["compare", "digits-mlp", "sgd", "--lr", "adamw=1"], "contestant of --lr 'adamw'"),
        (["compare", "digits-mlp", "sgd", "--context", "8"], "has no --context"),
        (["compare", "digits-mlp", "sgd", "--out", __file__], "--out"),
        (["overhead", "--model", "mlpp"], "Did you mean 'mlp'"),
        (["overhead", "--batch", "3"], "mlp has no --batch"),
        (["overhead", "--model", "digits-mlp", "--rows", "3"], "--rows is for mlp"),
        (["overhead", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["overhead", "--plot", "."], "this is a folder"),
        (["inspect", "digits"], "unknown task 'digits'"),
        (["inspect", "digits-mlp", "adamw"], "nothing to inspect"),
        (["inspect", "package.module"], "package.module:factory"),
        (["inspect", ":factory"], "package.module:factory"),
        (["inspect", "no_such_module:factory"], "cannot import 'no_such_module'"),
        (["inspect", "json:factory"], "'json' has no 'factory'"),
        (["inspect", "builtins:dict"], "gives a dict"),
        (["inspect", "json:dumps", "--width", "3"], "sizes are for tasks"),
    ],
)
def test_wrong_requests_end_with_status_2_and_a_hint(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--steps", "0"], "whole number from 1"),
        (["compare", "--seeds", "x"], "whole number from 1"),
        (["compare", "--warmup", "1"], "no share"),
        (["compare", "--weight-decay", "0.1,x"], "no number from 0 up"),
        (["compare", "--lr", "0.1"], "NAME=VALUE"),
        (["compare", "--lr", "sgd=-1"], "no positive number"),
        (["compare", "--lr", "sgd=x"], "no positive number"),
        (["overhead", "--processes", "1"], "whole number from 2"),
        (["overhead", "--scaling"], "benchmarks/scaling.py"),
        (["reproduce"], "required"),
        (["reproduce", "rule"], "invalid choice"),
        (["reproduce", "rules", "--steps-scale", "0"], "no positive number"),
        (["reproduce", "rules", "--tasks", "a,,b"], "separated by commas"),
        (["reproduce", "precision", "--out", "x"], "benchmarks/precision.py"),
        (["race"], "invalid choice"),
    ],
)
def test_wrong_options_end_with_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert "usage: mkor" in error
    assert message in error


@pytest.mark.parametrize(
    ("package", "contestant", "arguments"),
    [
        ("matplotlib", "sgd", ["--out", "folder"]),
        ("pytorch_optimizer", "lamb", []),
        ("sklearn", "sgd", []),
    ],
)
def test_a_missing_extra_says_how_to_install_it(
    package: str,
    contestant: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from mkor.bench.tasks import load_digits

    real = builtins.__import__

    def refuse(name: str, *rest: object, **keywords: object) -> object:
        if name.startswith(package):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **keywords)

    load_digits.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    task, *rest = RACE
    assert main(["compare", task, contestant, *rest, *arguments]) == 2
    assert "pip install 'mkor[bench]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [3, 20])
def test_ctrl_c_writes_what_is_complete(
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Progress.advance

    def interrupt(progress: Progress, label: str, count: int, value: float) -> None:
        real(progress, label, count, value)
        if progress.done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", interrupt)
    assert compare("--out", str(tmp_path)) == 130
    text = capsys.readouterr()
    if step < 12:
        assert "before the first seed was complete" in text.err
        assert list(tmp_path.iterdir()) == []
    else:
        assert "interrupted: 1 of 2 seeds" in text.out
        record = json.loads((tmp_path / "results.json").read_text())
        assert record["interrupted"]
        assert len(record["runs"]) == 2


def test_ctrl_c_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mkor.bench.race.load_task", interrupt)
    assert compare() == 130


def test_inspect_a_task_and_a_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "digits-mlp", "--width", "16"]) == 0
    text = capsys.readouterr().out
    assert "16x64" in text
    assert "output layer" in text
    (tmp_path / "their_models.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))\n"
        "ready = make()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("make", "ready"):
        assert main(["inspect", f"their_models:{name}", "mkor[rank=16]+sgd"]) == 0
        assert "5x7" in capsys.readouterr().out


def test_a_place_for_results_can_be_new_old_or_not_wanted(tmp_path: Path) -> None:
    assert prepare_file("--json", None) is None
    assert prepare_picture("--plot", None) is None
    assert prepare_folder(None) is None
    path = tmp_path / "x.json"
    assert prepare_file("--json", str(path)) == path
    assert not path.exists()
    path.touch()
    assert prepare_file("--json", path) == prepare_picture("--plot", path) == path
    folder = tmp_path / "new" / "inner"
    assert prepare_folder(str(folder)) == folder
    assert folder.is_dir()
    with pytest.raises(UsageError, match=r"^--out .*x\.json"):
        prepare_folder(str(path))


@pytest.mark.parametrize("name", ["old.json", "new.json"])
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everything, so the system's answer is put in its mouth.
    (tmp_path / "old.json").touch()
    asked = tmp_path / name if name == "old.json" else tmp_path
    monkeypatch.setattr("os.access", lambda path, mode: path != asked)
    with pytest.raises(UsageError, match="cannot be written"):
        prepare_file("--json", tmp_path / name)
