"""What the times of contestants come to, each beside the first: ratios, memory, parts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .overhead_counts import PARTS, Counts, summarize_counts
from .training import buffer_bytes, state_bytes
from .worker import Worker


@dataclass(frozen=True)
class Timing:
    """What a contestant's iterations cost; the base is the first contestant.

    Attributes:
        contestant: Its label.
        cpu_ms: Median CPU time of an iteration in milliseconds.
        wall_ms: Median wall time.
        ratio: Median over rounds of its CPU time over the base's in the same round; on a GPU of
            the wall time.
        low: Lower quartile of that ratio.
        high: Upper quartile.
        mean_ratio: All its CPU time over all of the base's: work that is done only every so
            often shows here, and so does noise.
        wall_ratio: As `ratio`, in wall time.
        state_bytes: Memory of the optimizer's state.
        extra_memory: State beyond the base's, over the base's weights, gradients and state.
        buffer_bytes: Memory that stays beside the state: where a step's statistics are summed.
        parts_ms: Mean CPU time of the parts; those within forward, backward and step under the
            profiler, which slows them a little.
        cpu_samples: CPU seconds of each round.
        wall_samples: Wall seconds of each round.
        parts_wall_ms: Mean wall time of the parts, likewise.
        page_faults: Median number per round: memory that the system had to be asked for.
        counts: What an iteration does.
    """

    contestant: str
    cpu_ms: float
    wall_ms: float
    ratio: float
    low: float
    high: float
    mean_ratio: float
    wall_ratio: float
    state_bytes: int
    extra_memory: float
    buffer_bytes: int
    parts_ms: dict[str, float]
    cpu_samples: tuple[float, ...]
    wall_samples: tuple[float, ...]
    parts_wall_ms: dict[str, float]
    page_faults: float
    counts: Counts


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile.

    Args:
        values: At least one number.

    Returns:
        The three.
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, one contestant's time over the base's: what slows a round slows both.

    Args:
        values: The contestant's times.
        base: The base's.

    Returns:
        Their ratios.
    """
    return [value / other for value, other in zip(values, base, strict=True)]


def summarize(worker: Worker, base: Worker, parts: dict[str, float]) -> Timing:
    """What a worker's times come to.

    Args:
        worker: The worker.
        base: The worker it is compared with.
        parts: CPU seconds of its parts.

    Returns:
        The summary.
    """
    low, middle, high = quartiles(ratios(worker.times, base.times))
    own, others = state_bytes(worker.optimizer), state_bytes(base.optimizer)
    return Timing(
        contestant=worker.label,
        cpu_ms=1e3 * statistics.median(worker.cpu),
        wall_ms=1e3 * statistics.median(worker.wall),
        ratio=middle,
        low=low,
        high=high,
        mean_ratio=sum(worker.times) / sum(base.times),
        wall_ratio=statistics.median(ratios(worker.wall, base.wall)),
        state_bytes=own,
        extra_memory=(own - others) / (base.model_bytes() + others),
        buffer_bytes=buffer_bytes(worker.optimizer),
        parts_ms={key: 1e3 * parts[key] for key in PARTS if key in parts},
        cpu_samples=tuple(worker.cpu),
        wall_samples=tuple(worker.wall),
        parts_wall_ms={key: 1e3 * seconds for key, seconds in worker.walls().items()},
        page_faults=statistics.median(worker.faults),
        counts=summarize_counts(worker.profiles),
    )


def summarize_all(workers: Sequence[Worker]) -> list[Timing]:
    """What the workers' times come to.

    Args:
        workers: The first is the base.

    Returns:
        One timing for each.
    """
    return [summarize(worker, workers[0], worker.parts()) for worker in workers]
