"""Starts processes that train together, listens to them, and leaves none behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from .errors import UsageError

HOST = "127.0.0.1"
MEET_SECONDS = 120.0
"""How long a process waits for the others."""

Say = Callable[[Any], None]
Work = Callable[["Place", Any, Say], Any]


class Place:
    """Where a process is among those that train together.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        port: Where they meet.
    """

    def __init__(self, rank: int, world: int, port: int) -> None:
        """Joins the others' meeting point.

        Args:
            rank: The process's number.
            world: How many there are.
            port: Where they meet.
        """
        self.rank, self.world, self.port = rank, world, port
        limit = timedelta(seconds=MEET_SECONDS)
        self.store = TCPStore(HOST, port, timeout=limit)
        self._meetings = 0

    def meet(self) -> None:
        """Waits for the others without a collective."""
        self._meetings += 1
        name = f"meeting {self._meetings}"
        if self.store.add(name, 1) == self.world:
            self.store.set(f"{name} complete", "")
        self.store.wait([f"{name} complete"])


def run_together(work: Work, world: int, task: Any, heard: Say, seconds: float) -> list[Any]:
    """Runs `work(place, task, say)` on several processes of this machine, with a gloo group.

    Args:
        work: A function of a module.
        world: How many processes.
        task: What they are given; it is pickled.
        heard: Told what the first process says.
        seconds: The time they may take.

    Returns:
        What each process returns.

    Raises:
        UsageError: If a process fails, or time is up.
    """
    server = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    processes: list[SpawnProcess] = []
    ends: list[Connection] = []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            how = (theirs, rank, world, server.port, torch.get_num_threads(), work, task)
            processes.append(context.Process(target=_enter, args=how, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(ours)
        return _listen(ends, heard, time.monotonic() + seconds)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _listen(ends: list[Connection], heard: Say, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = [rank for rank in range(len(ends)) if rank not in results]
        ready = wait([ends[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise UsageError("the processes take too long; try a smaller model.")
        for rank in waiting:
            if ends[rank] not in ready:
                continue
            try:
                topic, content = ends[rank].recv()
            except EOFError:
                raise UsageError(f"process {rank} ended without a result.") from None
            if topic == "failed":
                raise UsageError(f"process {rank} failed: {content}")
            if topic == "done":
                results[rank] = content
            elif rank == 0:
                heard(content)
    return [results[rank] for rank in range(len(ends))]


def _enter(
    end: Connection, rank: int, world: int, port: int, threads: int, work: Work, task: Any
) -> None:
    """The new process.

    Args:
        end: Where it reports.
        rank: Its number.
        world: How many there are.
        port: Where they meet.
        threads: Threads to compute with.
        work: What it does.
        task: What it is given.
    """
    # Whoever interrupts the command interrupts all; the first process answers for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    try:
        place = Place(rank, world, port)
        limit = timedelta(seconds=MEET_SECONDS)
        group = PrefixStore("group", place.store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=limit)
        result = work(place, task, lambda content: end.send(("said", content)))
        end.send(("done", result))
        # Nobody leaves while others may still need its connections.
        place.meet()
    except Exception as error:
        told = isinstance(error, UsageError)
        end.send(("failed", str(error) if told else "".join(traceback.format_exception(error))))
    # Without the destructors of process groups, which may wait for each other.
    os._exit(0)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    os._exit(1)
