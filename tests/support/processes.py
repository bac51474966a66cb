"""Runs functions on several gloo processes: started fast, bounded in time, ended whatever happens.

A server imports torch once; processes are forked from it. They meet in a store that the test's own
process serves on a port the system picks. A process ends when its time is up, when the test is
interrupted, and when the test's process is gone.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

HOST = "127.0.0.1"
TIMEOUT = 90.0
"""Seconds that a launch may take."""
COLLECTIVE = 30.0
"""Seconds that a process waits for the others in a collective: the group's time-out."""
GRACE = 10.0
"""Seconds that processes have, beside the group's time-out, to notice that another one failed."""
DEEPEST = 12
"""Frames of a traceback that are shown, the innermost."""
KEPT: list[dist.ProcessGroup] = []
"""Groups of a process that runs one case: they end with it."""
PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "transformers.pytorch_utils",
    "mkor.optimizers",
    "pytest",
)


@dataclass(frozen=True)
class Failure:
    """An exception of another process."""

    kind: str
    message: str
    trace: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a process ended: what its function returned or raised; if it was killed, by what."""

    value: Any
    failure: Failure | None
    signal: int
    seconds: float
    stack: str


@dataclass(frozen=True)
class Place:
    """Where a function runs: its first argument."""

    rank: int
    world: int
    folder: Path
    store: dist.Store
    collective: float

    @contextmanager
    def group(self, name: str = "") -> Iterator[None]:
        """A default group of its own."""
        store = dist.PrefixStore(name, self.store)
        limit = timedelta(seconds=self.collective)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world, timeout=limit
        )
        yield
        gc.collect()
        if not name:
            # What still holds them is freed later, and gloo's destructor then waits, with the
            # interpreter's lock, for threads that may wait for that lock.
            KEPT.extend(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()

    def meet(self, name: str, well: bool) -> bool:
        """Wait for the others, without a group, to hear whether all are well."""
        if not well:
            self.store.set(f"{name}/all", "no")
        elif self.store.add(f"{name}/here", 1) == self.world:
            self.store.set(f"{name}/all", "yes")
        self.store.wait([f"{name}/all"], timedelta(seconds=2 * self.collective))
        return self.store.get(f"{name}/all") == b"yes"


Work = Callable[..., Any]


def forking() -> Any:
    """Starts processes that need not import torch."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Forking:
    """Stands for the module ``multiprocessing``: all is started fast, and noted as asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_context(self, method: str) -> Any:
        self.asked.append(method)
        return forking()


def outcomes(
    work: Work,
    world: int,
    folder: Path,
    *args: Any,
    timeout: float = TIMEOUT,
    collective: float = COLLECTIVE,
) -> list[Outcome]:
    """Runs ``work(place, *args)`` on ``world`` processes, and says how each one ended."""
    server = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = forking()
    start = time.monotonic()
    processes = []
    for path in (*folder.glob("[0-9].pt"), *folder.glob("*.stack")):
        path.unlink()  # of an earlier launch
    try:
        for rank in range(world):
            how = (rank, world, folder, server.port, start + timeout, collective, work, args)
            processes.append(context.Process(target=_enter, args=how, daemon=True))
            processes[-1].start()
        ended = _wait_for(processes, start + timeout, collective + GRACE)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    return [
        _outcome(folder, rank, process.exitcode, ended.get(rank, time.monotonic()) - start)
        for rank, process in enumerate(processes)
    ]


def launch(work: Work, world: int, folder: Path, *args: Any, **limits: float) -> list[Any]:
    """Runs ``work(place, *args)`` on ``world`` processes, and returns what each one returned."""
    ended = outcomes(work, world, folder, *args, **limits)
    bad = [complaint(rank, outcome) for rank, outcome in enumerate(ended) if not _well(outcome)]
    if bad:
        pytest.fail("\n\n".join(bad), pytrace=False)
    return [outcome.value for outcome in ended]


# --------------------------------------------------------------------------- in the new processes


def _enter(rank, world, folder, port, deadline, collective, work, args) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # a full collection takes longer than most cases
    start = time.monotonic()
    path = folder / f"{rank}.pt"
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(max(0.1, deadline - 1 - start), file=stack)
        try:
            store = dist.TCPStore(HOST, port, timeout=timedelta(seconds=collective))
            value = work(Place(rank, world, folder, store, collective), *args)
        except Exception as error:
            # Groups whose peers are gone may wait for ever in their destructors: free nothing.
            save({"value": None, "failure": described(error, start)}, path)
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
    save({"value": value, "failure": None}, path)


def _end_with_parent() -> None:
    wait([mp.parent_process().sentinel])
    os._exit(1)


def described(error: Exception, start: float) -> dict[str, Any]:
    """A failure of this process, ``start`` being when its work began."""
    trace = "".join(traceback.format_exception(error, limit=-DEEPEST))
    seconds = time.monotonic() - start
    return {"kind": type(error).__name__, "message": str(error), "trace": trace, "seconds": seconds}


def save(found: Any, path: Path) -> None:
    """Whole or not at all."""
    torch.save(found, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


# ----------------------------------------------------------------------------------- in the test


def _wait_for(processes: Sequence[Any], deadline: float, grace: float) -> dict[int, float]:
    """When each process ended, by rank; those that have not by the deadline are missing.

    After one has failed, the others have ``grace`` seconds left.
    """
    ended: dict[int, float] = {}
    while len(ended) < len(processes) and time.monotonic() < deadline:
        running = {p.sentinel: r for r, p in enumerate(processes) if r not in ended}
        for sentinel in wait(list(running), max(0.0, deadline - time.monotonic())):
            ended[running[sentinel]] = now = time.monotonic()
            if processes[running[sentinel]].exitcode:
                deadline = min(deadline, now + grace)
    return ended


def _outcome(folder: Path, rank: int, exitcode: int, seconds: float) -> Outcome:
    path, stack = folder / f"{rank}.pt", folder / f"{rank}.stack"
    text = stack.read_text() if stack.exists() else ""
    if path.exists():
        found = torch.load(path, weights_only=True)
        failure = None if found["failure"] is None else Failure(**found["failure"])
        return Outcome(found["value"], failure, max(0, -exitcode), seconds, text)
    ended = f"exit code {exitcode}"
    failure = None if exitcode < 0 else Failure("no result", ended, ended, seconds)
    return Outcome(None, failure, max(0, -exitcode), seconds, text)


def _well(outcome: Outcome) -> bool:
    return outcome.failure is None and not outcome.signal


def complaint(rank: int, outcome: Outcome) -> str:
    text = f"Process {rank} ended after {outcome.seconds:.1f} s"
    if outcome.signal:
        text += f" by {signal.Signals(outcome.signal).name}"
    details = outcome.failure.trace if outcome.failure is not None else outcome.stack
    return f"{text}:\n{details}"
