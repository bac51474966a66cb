"""Every file in ``examples/`` runs as it is, in seconds, learns something, and is short."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

DISTRIBUTED = {"ddp", "fsdp"}
"""Started by torchrun: test_examples_distributed.py."""
FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in DISTRIBUTED]
LOSSES = re.compile(r"loss: (\d+\.\d+) -> (\d+\.\d+)")

pytestmark = [
    # Of the frameworks themselves, where there is no accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # Lightning asks torch's tree utilities a question that torch has renamed.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # The examples' data needs no processes of its own.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # peft 0.21 asks transformers 5.23 by an older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem, name="path")
def _path(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_states():
    """Accelerate keeps its set-up in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_there_are_examples():
    names = {"plain", "trainer", "accelerate_loop", "lightning_trainer", "lora"}
    assert {path.stem for path in EXAMPLES} >= names


def test_runs(path, tmp_path, monkeypatch, capsys):
    """Its last line is ``loss: first -> last``; what it writes goes to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    threads = torch.get_num_threads()
    runpy.run_path(str(path), run_name="__main__")
    first, last = map(float, LOSSES.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups())
    assert last < 0.8 * first
    assert torch.get_num_threads() == threads


def test_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert text.startswith('"""')
    assert "MKOR(" in text or "optimizer_factory(MKOR" in text


def test_shadows_no_package(path):
    """Run as a script, an example called like a package is imported in its place."""
    assert importlib.util.find_spec(path.stem) is None
