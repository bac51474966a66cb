"""The examples of several processes run under torchrun, learn, and continue after being killed."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
import uuid
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from support.processes import HOST, launch

EXAMPLES = Path(__file__).parents[2] / "examples"
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


def undisturbed(place, name):
    """A run from the start to the end, with torchrun's environment but not its restarts."""
    os.chdir(place.folder)
    rank, world = str(place.rank), str(place.world)
    os.environ |= ENVIRONMENT | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(place.store.port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module", name="disturbed", params=NAMES)
def _disturbed(request, tmp_path_factory):
    """A run under torchrun, two of whose processes are killed: its name and folder, its prints."""
    folder = tmp_path_factory.mktemp(request.param)
    script = folder / "disturbed.py"
    script.write_text(DISTURBED)
    printed = torchrun(folder, "--max-restarts", 2, script, EXAMPLES / f"{request.param}.py")
    return request.param, folder, printed


def test_runs(disturbed):
    """Its last line is ``loss: first -> last``, said by one process."""
    _, _, printed = disturbed
    assert len(LOSSES.findall(printed)) == 1
    first, last = map(float, LOSSES.fullmatch(printed.splitlines()[-1]).groups())
    assert last < 0.8 * first


def test_killed_processes_change_nothing(disturbed, tmp_path):
    """Not in the middle of a step, not in the middle of a checkpoint."""
    name, folder, printed = disturbed
    said, nothing = launch(undisturbed, 2, tmp_path, name, timeout=SECONDS)
    assert said.splitlines()[-1] == printed.splitlines()[-1]
    assert nothing == ""
    torch.testing.assert_close(
        last_checkpoint(name, folder), last_checkpoint(name, tmp_path), rtol=0, atol=0
    )
    report = eval((folder / "report").read_text())
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
