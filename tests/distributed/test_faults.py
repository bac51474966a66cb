"""A process that is killed or stuck ends the others with an error; none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mkor
from support import processes
from support.processes import launch, outcomes

OPTIONS = {"rank": 4, "vectors": 2, "rows": 8}
LIMIT = 5.0
"""The group's time-out, in seconds."""
SLACK = 5.0
"""Seconds that all else may take, on a busy machine."""
AT = 3
"""The step in which it happens."""


def build(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    if kind == "FSDP2":
        fully_shard(net)
    wrap, options = (mkor.KFAC, {}) if kind == "KFAC" else (mkor.MKOR, OPTIONS)
    optimizer = wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
    return (DistributedDataParallel(net) if kind in ("DDP", "KFAC") else net), optimizer


def kill(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def stall(_=None):
    time.sleep(LIMIT + 3)


def victim(place, kind, where, what):
    """Train; the last process meets its fate in the middle of a step."""
    with place.group():
        model, optimizer = build(kind)
        for step in range(50):
            mine = step == AT and place.rank == place.world - 1
            optimizer.zero_grad()
            out = model(torch.randn(16, 8))
            if mine and where == "backward":
                out.register_hook(what)
            out.square().mean().backward()
            if mine and where == "step":
                what()
            if mine and where == "base":
                optimizer.base.register_step_pre_hook(lambda *_: what())
            optimizer.step()


@pytest.mark.parametrize(
    ("world", "kind", "where"),
    [
        (2, "DDP", "backward"),
        (2, "plain", "step"),
        (2, "FSDP2", "step"),
        (3, "DDP", "step"),
        (3, "KFAC", "base"),
    ],
)
def test_a_killed_process_ends_the_others(tmp_path, world, kind, where):
    """With an error, within the group's time-out."""
    *others, last = outcomes(victim, world, tmp_path, kind, where, kill, collective=LIMIT)
    assert last.signal == signal.SIGKILL
    for other in others:
        assert other.signal == 0
        assert other.failure is not None
        assert other.seconds - last.seconds < LIMIT + SLACK


def test_a_stuck_process_ends_the_others_in_time(tmp_path):
    """The wrapper's own group has the time-out of the one it was made from."""
    how = (victim, 2, tmp_path, "plain", "step", stall)
    start = time.monotonic()
    first, last = outcomes(*how, collective=LIMIT)
    assert first.failure is not None
    assert first.signal == 0
    assert LIMIT < first.failure.seconds < 2 * LIMIT + SLACK, "not at once, and not much later"
    assert last.failure is not None
    assert time.monotonic() - start < 60


# ------------------------------------------------------------------------------------ the harness


def raises(place):
    if place.rank == 1:
        raise KeyError("the reason")


def pids(place):
    return os.getpid()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_exception_is_shown_with_its_process(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)Process 1 .*KeyError: 'the reason'"):
        launch(raises, 2, tmp_path)


def linger(place):
    (place.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_a_hang_is_ended_and_located(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)SIGKILL.*in linger"):
        launch(linger, 1, tmp_path, timeout=3.0)


def test_processes_end_with_the_launch(tmp_path):
    assert all(gone(pid) for pid in launch(pids, 3, tmp_path))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import processes

def linger(place):
    import os, time
    (place.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    processes.PRELOADED = ("torch.distributed",)
    processes.launch(linger, 1, Path({folder!r}))
"""


def soon(true):
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert true()


def test_processes_end_with_a_test_that_is_interrupted(tmp_path, monkeypatch):
    told = tmp_path / "pid"

    def interrupted(*_):
        soon(lambda: told.exists() and told.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(linger, 1, tmp_path)
    assert gone(int(told.read_text()))


def test_processes_end_with_a_test_that_is_killed(tmp_path):
    """Nobody is left to end them: they notice by themselves."""
    script, told = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL) as parent:
        try:
            soon(lambda: told.exists() and told.read_text())
        finally:
            parent.kill()
    soon(lambda: gone(int(told.read_text())))
