"""The command line as a user meets it."""

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mkor.bench.cli import main
from mkor.bench.progress import Progress

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
        (["compare", "digits-mlp", "sgd", "--lr", "0.1"], "contestant of --lr '0.1'"),
        (["compare", "digits-mlp", "sgd", "--lr", "sgd=-1"], "no positive number"),
        (["compare", "digits-mlp", "sgd", "--lr", "sgd=x"], "no positive number"),
        (["compare", "digits-mlp", "sgd", "--context", "8"], "has no --context"),
        (["compare", "digits-mlp", "sgd", "--out", __file__], "--out"),
        (["overhead", "--model", "mlpp"], "Did you mean 'mlp'"),
        (["overhead", "--batch", "3"], "mlp has no --batch"),
        (["overhead", "--model", "digits-mlp", "--rows", "3"], "--rows is for mlp"),
        (["overhead", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["overhead", "--json", "."], "this is a folder"),
        (["overhead", "--plot", "."], "this is a folder"),
        (["inspect", "digits"], "unknown task 'digits'"),
        (["inspect", "digits-mlp", "adamw"], "nothing to inspect"),
        (["inspect", "package.module"], "package.module:factory"),
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
    "arguments",
    [
        ["compare", "--steps", "0"],
        ["compare", "--seeds", "x"],
        ["compare", "--warmup", "1"],
        ["compare", "--weight-decay", "0.1,x"],
        ["race"],
    ],
)
def test_wrong_options_end_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: mkor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("matplotlib", ["--out", "folder"]),
        ("pytorch_optimizer", []),
    ],
)
def test_a_missing_extra_says_how_to_install_it(
    package: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    task, *rest = RACE
    assert main(["compare", task, "lamb", *rest, *arguments]) == 2
    assert "pip install 'mkor[bench]'" in capsys.readouterr().err


def test_scikit_learn_may_be_missing_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mkor.bench.tasks.digits import load_digits

    real = builtins.__import__

    def refuse(name: str, *rest: object, **keywords: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **keywords)

    load_digits.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert compare() == 2
    assert "needs scikit-learn, which is missing: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "status"), [(3, 130), (20, 130)])
def test_ctrl_c_writes_what_is_complete(
    step: int,
    status: int,
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
    assert compare("--out", str(tmp_path)) == status
    text = capsys.readouterr()
    if step < 12:
        assert "before the first seed was complete" in text.err
        assert list(tmp_path.iterdir()) == []
    else:
        assert "interrupted: 1 of 2 seeds" in text.out
        record = json.loads((tmp_path / "results.json").read_text())
        assert record["interrupted"]
        assert len(record["runs"]) == 2


def test_overhead_prints_ratios_and_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "overhead.json"
    sizes = ["--width", "16", "--depth", "2", "--rows", "64", "--rounds", "4"]
    assert main(["overhead", "adamw,mkor+adamw", *sizes, "--quiet", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "1.000x" in text
    for part in ("forward", "backward", "step", "capture", "update", "precondition", "base_step"):
        assert part in text
    base, wrapped = json.loads(path.read_text())["timings"]
    assert base["ratio"] == base["low"] == base["high"] == base["mean_ratio"] == 1.0
    assert base["extra_memory"] == 0 < wrapped["extra_memory"]
    assert len(wrapped["cpu_samples"]) == 4
    assert wrapped["parts_ms"].keys() > base["parts_ms"].keys() == {"forward", "backward", "step"}


def test_overhead_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "16", "--depth", "2", "--batch", "16", "--rounds", "1"]
    assert main(["overhead", "sgd,adamw", "--model", "digits-mlp", *sizes]) == 0
    assert "digits-mlp: width 16, depth 2, batch 16; 1 rounds" in capsys.readouterr().out


def test_inspect_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "digits-mlp", "--width", "16"]) == 0
    text = capsys.readouterr().out
    assert "16x64" in text
    assert "output layer" in text


def test_inspect_a_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
