"""Code that documentation shows has to run: README's, the docs' and the docstrings'."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mkor

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """Every python block of README and docs, as ``file:line`` and code."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}")


def modules():
    return ["mkor"] + [
        module.name
        for module in pkgutil.walk_packages(mkor.__path__, "mkor.")
        if not module.name.endswith("__main__")
    ]


def given():
    """What a reader of a fragment has anyway: a model, data and a loss."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    return {
        "__name__": "readme",
        "torch": torch,
        "nn": nn,
        "model": model,
        "loader": [(x, y)] * 3,
        "loss_fn": nn.CrossEntropyLoss(),
        "x": x,
        "y": y,
    }


@pytest.mark.parametrize("code", list(blocks()))
def test_block_runs(code, capsys):
    exec(compile(code, "documentation", "exec"), given())


def test_readme_shows_how_to_use_it():
    """The five lines are there, and so are the two commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any("MKOR(" in code for code in BLOCK.findall(text))
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_docstring_examples():
    found = doctest.DocTestFinder().find(importlib.import_module("mkor.optimizers"))
    assert any(test.examples for test in found)


def test_everything_public_has_a_docstring():
    for name in mkor.__all__:
        assert getattr(mkor, name).__doc__, name
        assert name in dir(mkor)


def headings(path):
    """As GitHub names them in links."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)#?([^)]*)\)", text):
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not heading or heading in headings(there), f"{target}#{heading}"
