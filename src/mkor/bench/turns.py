"""Whole training iterations of several contestants, timed in turn; then profiled in turn."""

from __future__ import annotations

from collections.abc import Sequence

from .contestants import Contestant
from .progress import Progress
from .rounds import in_turn
from .worker import Subject, Worker


def run_all(
    contestants: Sequence[Contestant], subject: Subject, rounds: int, progress: Progress
) -> list[Worker]:
    """Times contestants in turn, then profiles them in turn.

    Args:
        contestants: The contestants.
        subject: What is trained.
        rounds: Timed iterations of each.
        progress: Where rounds are reported.

    Returns:
        The workers with their times.
    """
    profiled = Worker.profiled_rounds
    workers = [Worker(contestant, subject) for contestant in contestants]
    labels = [worker.label for worker in workers]
    progress.expect((rounds + profiled) * len(workers))
    for worker in workers:
        worker.warm_up()
    progress.phase("timing", labels, rounds, unit="ms")
    for index in range(rounds):
        for worker in in_turn(workers, index):
            progress.advance(worker.label, index + 1, 1e3 * worker.timed())
    progress.phase("profiling", labels, profiled, unit="ms")
    for index in range(profiled):
        for worker in in_turn(workers, index):
            worker.profile()
            progress.advance(worker.label, index + 1, 1e3 * worker.profiles[-1].cpu)
    return workers
