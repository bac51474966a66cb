"""The examples of several processes run under torchrun, learn, and continue after being killed."""

import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("ddp", "fsdp")
LOSSES = re.compile(r"loss: (\d+\.\d+) -> (\d+\.\d+)")
SECONDS = 200.0
MARK = "MKOR_TEST_RUN"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # two processes do not share one GPU
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the examples say
}

# Runs an example; what it does to the processes depends on how often they were restarted.
DISTURBED = """
import os, runpy, signal, sys
from pathlib import Path
from torch.optim import AdamW

attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
taken, step, fsync = 0, AdamW.step, os.fsync

def counted_step(self, closure=None):
    global taken
    taken += 1
    if (attempt, rank, taken) == (0, 1, 50):
        os.kill(os.getpid(), 9)  # statistics are summed, weights are as before
    return step(self, closure)

def dying_fsync(file):
    if (attempt, rank) == (1, 0) and taken >= 40:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), 9)  # half of the second checkpoint since the restart is written
    fsync(file)

AdamW.step, os.fsync = counted_step, dying_fsync
found = sorted(str(path) for path in Path().rglob("*"))
runpy.run_path(sys.argv[1], run_name="__main__")
if rank == 0:
    Path("report").write_text(repr({"attempt": attempt, "taken": taken, "found": found}))
"""


def marked(mark):
    """Processes of a run, whoever their parent is by now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def torchrun(folder, *arguments):
    """What two processes print; nothing of them is left behind."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *map(str, arguments)]
    env = os.environ | ENVIRONMENT | {MARK: mark}
    how = {"cwd": folder, "env": env, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=SECONDS, check=False, **how)
        left = marked(mark)
    finally:
        for process in marked(mark):
            os.kill(process, signal.SIGKILL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not left
    return done.stdout


def last_checkpoint(name, folder):
    """Weights, factors, moments and losses."""
    path = folder / "ddp.pt"
    if name == "fsdp":
        path = folder / "whole.pt"
        dcp_to_torch_save(max((folder / "fsdp-checkpoints").glob("[0-9]*")), path)
    saved = torch.load(path, weights_only=True)
    del saved["optimizer"]["param_groups"]
    return saved


@pytest.fixture(scope="module", name="undisturbed", params=NAMES)
def _undisturbed(request, tmp_path_factory):
    """A run from the start to the end: the example's name, what it printed, its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    printed = torchrun(folder, EXAMPLES / f"{request.param}.py")
    return request.param, printed, folder


def test_runs(undisturbed):
    """Its last line is ``loss: first -> last``, said by one process."""
    _, printed, _ = undisturbed
    assert len(LOSSES.findall(printed)) == 1
    first, last = map(float, LOSSES.fullmatch(printed.splitlines()[-1]).groups())
    assert last < 0.8 * first


def test_killed_processes_change_nothing(undisturbed, tmp_path):
    """Not in the middle of a step, not in the middle of a checkpoint."""
    name, printed, folder = undisturbed
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED)
    again = torchrun(tmp_path, "--max-restarts", 2, script, EXAMPLES / f"{name}.py")
    assert again.splitlines()[-1] == printed.splitlines()[-1]
    torch.testing.assert_close(
        last_checkpoint(name, tmp_path), last_checkpoint(name, folder), rtol=0, atol=0
    )
    report = eval((tmp_path / "report").read_text())
    assert report["attempt"] == 2
    assert 60 <= report["taken"] <= 61  # from step 60 on; a set-up step takes none
    halves = {"ddp": "ddp.pt.tmp", "fsdp": "fsdp-checkpoints/unfinished/__0_0.distcp"}
    assert halves[name] in report["found"]


@pytest.mark.parametrize("name", NAMES)
def test_is_short_and_says_what_it_is(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert text.startswith('"""')
    assert "MKOR(model" in text
