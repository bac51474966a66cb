"""The scripts of ``benchmarks/`` run, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mkor

ROOT = Path(mkor.__file__).resolve().parents[2]
TINY = {
    "costs.py": ["--tiny", "--rows", "mlp-64-64", "--turns", "2", "--against", str(ROOT)],
    "scaling.py": ["--widths", "8,512,513", "--steps", "1"],
    "precision.py": ["--width", "16", "--updates", "2", "--scales", "0.01"],
    "attention.py": ["--steps", "2", "--seeds", "1"],
}


@pytest.mark.parametrize("name", TINY)
def test_script(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *TINY[name], "--out", str(out)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text(encoding="utf-8"))
    assert done.stdout
