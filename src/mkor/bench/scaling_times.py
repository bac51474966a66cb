"""What one layer's curvature costs against its width, timed without training.

The layer is square and has no bias. Its statistics are random and handed in ready, so neither
capture nor, for KFAC, the covariance of a batch is in the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import mkor
from mkor.capture.gate import Gate
from mkor.curvature.contract import SIDES, BatchShape, Curvature, Inverting, Statistics
from mkor.selection import select
from mkor.step.layout import allocate

from .progress import Progress
from .scaling_fit import BOTH, SENT, Curve, make_curve

WIDTHS = (128, 256, 512, 1024, 2048, 4096)
# A part is repeated for so many CPU seconds, but no fewer and no more times than this.
SECONDS, FEWEST, MOST = 2.0, 5, 200
ROWS = 256
SEED = 0

Work = Callable[[], object]


@dataclass(frozen=True)
class Method:
    """A curvature that is timed.

    Attributes:
        name: For reading.
        curvature: With its options.
        parts: What is timed.
        number: Of the update that is timed, from 0: it decides whether KFAC inverts.
    """

    name: str
    curvature: Curvature
    parts: tuple[str, ...] = ("update", "precondition")
    number: int = 0


@dataclass(frozen=True)
class Timed:
    """Median CPU seconds of a piece of work, and how often it was done."""

    seconds: float
    repetitions: int


def methods() -> list[Method]:
    """What is timed, each with its defaults.

    Returns:
        The methods; KFAC also between inversions.
    """
    return [
        Method("window", mkor.Window()),
        Method("dense, paper", mkor.DenseInverse(rule="paper")),
        Method("KFAC", mkor.Covariance(inverse_every=1)),
        Method("KFAC, no inverse", mkor.Covariance(inverse_every=2), ("update",), number=1),
        Method("Eva", mkor.RankOne()),
    ]


def shape_of(width: int) -> BatchShape:
    """One square layer without bias.

    Args:
        width: Its width.

    Returns:
        Its shape.
    """
    return BatchShape(1, width, width, False, SIDES, torch.float32, torch.device("cpu"))


def random_statistics(method: Method, width: int) -> Statistics:
    """One update's statistics, made of normal numbers.

    Args:
        method: Whose update it is.
        width: Of the layer.

    Returns:
        The statistics; covariances have the rank of `ROWS` rows.
    """
    k, generator = method.curvature.vectors, torch.Generator().manual_seed(SEED)

    def covariance() -> Tensor:
        rows = torch.randn(ROWS, width, generator=generator)
        return (rows.mT @ rows / ROWS).unsqueeze(0)

    return Statistics(
        vectors={side: torch.randn(1, k, width, generator=generator) for side in SIDES},
        mean_square={side: torch.ones(1) for side in SIDES},
        filled=torch.ones(1, k, dtype=torch.bool),
        accept=torch.ones(1, dtype=torch.bool),
        update=method.number,
        covariance={side: covariance() for side in SIDES if method.curvature.covariance},
    )


def repeat(work: Work, reset: Work, seconds: float) -> Timed:
    """Times a piece of work.

    Args:
        work: What is timed, after one run that is not.
        reset: What comes before each run, untimed.
        seconds: For how long it is repeated.

    Returns:
        The median.
    """
    times: list[float] = []
    while len(times) < FEWEST + 1 or (len(times) <= MOST and sum(times[1:]) < seconds):
        reset()
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return Timed(statistics.median(times[1:]), len(times) - 1)


def update_of(curvature: Curvature, state: dict[str, Tensor], figures: Statistics) -> Work:
    """An update, with the inversion that goes with it.

    Args:
        curvature: The kind of factor.
        state: Its state, changed in place by each call of what is returned.
        figures: The statistics.

    Returns:
        What takes the update.
    """
    update = partial(curvature.update, state, figures)
    # Asking for a protocol takes as long as a small update, so it is asked once.
    if not isinstance(curvature, Inverting) or not curvature.due(figures.update):
        return update
    renew = curvature.renew

    def update_and_renew() -> None:
        update()
        renew(state, state["updates"] > 0)

    return update_and_renew


def time_parts(method: Method, width: int, seconds: float) -> Iterator[tuple[str, Timed]]:
    """Times the parts of a method at one width.

    Args:
        method: The method.
        width: The width.
        seconds: For how long a part is repeated.

    Yields:
        Each part with its time.
    """
    curvature, shape = method.curvature, shape_of(width)
    state, figures = curvature.init(shape), random_statistics(method, width)
    gradient = torch.randn(1, width, width, generator=torch.Generator().manual_seed(SEED + 1))
    W, ok = torch.empty_like(gradient), torch.ones(1, dtype=torch.bool)

    def precondition() -> None:
        curvature.apply(curvature.prepare(state, shape), W, None, ok)

    works: dict[str, Work] = {
        "update": update_of(curvature, state, figures),
        "precondition": precondition,
    }
    for part in method.parts:
        # Applied again and again, an inverse would carry the gradient out of range.
        yield part, repeat(works[part], lambda: W.copy_(gradient), seconds)


@torch.no_grad()
def measure(
    method: Method, widths: Sequence[int], seconds: float, progress: Progress
) -> list[Curve]:
    """Times a method at all widths.

    Args:
        method: The method.
        widths: The widths.
        seconds: For how long a part is repeated at each.
        progress: Where times are reported.

    Returns:
        A curve for each part, and for their sum.
    """
    found: dict[str, list[Timed]] = {part: [] for part in method.parts}
    for place, width in enumerate(widths):
        for part, timed in time_parts(method, width, seconds):
            found[part].append(timed)
        total = sum(column[-1].seconds for column in found.values())
        progress.advance(method.name, place + 1, 1e3 * total)
    values = {part: [timed.seconds for timed in column] for part, column in found.items()}
    counts = {part: [timed.repetitions for timed in column] for part, column in found.items()}
    if len(values) > 1:
        values[BOTH] = [sum(column) for column in zip(*values.values(), strict=True)]
        counts[BOTH] = [min(column) for column in zip(*counts.values(), strict=True)]
    return [make_curve(method.name, part, widths, values[part], counts[part]) for part in values]


def numbers_sent(curvature: Curvature, width: int) -> int:
    """Numbers that each process sends per update, counted in the buffer that is summed.

    Args:
        curvature: The kind of factor.
        width: Of the layer.

    Returns:
        The size of the buffer of a model of one layer.
    """
    layer = nn.Linear(width, width, bias=False, device="meta")
    chosen = select(layer, layer.parameters(), ()).layers
    gate = Gate(curvature.vectors, curvature.rows, True, True, curvature.covariance)
    _, buffers = allocate(chosen, curvature, gate)
    return sum(buffer.numel() for buffer in buffers)


def count_sent(chosen: Sequence[Method], widths: Sequence[int]) -> list[Curve]:
    """Numbers per update against the width.

    Args:
        chosen: The methods; those that precondition are counted.
        widths: The widths.

    Returns:
        A curve for each.
    """
    return [
        make_curve(
            method.name, SENT, widths, [numbers_sent(method.curvature, width) for width in widths]
        )
        for method in chosen
        if "precondition" in method.parts
    ]


def run_scaling(widths: Sequence[int], progress: Progress, seconds: float = SECONDS) -> list[Curve]:
    """Measures everything.

    Args:
        widths: The widths, rising.
        progress: Where times are reported.
        seconds: For how long each part is repeated at each width.

    Returns:
        All curves.
    """
    chosen = methods()
    progress.expect(len(chosen) * len(widths))
    progress.phase("widths", [method.name for method in chosen], len(widths), unit="ms")
    curves = [c for method in chosen for c in measure(method, widths, seconds, progress)]
    return curves + count_sent(chosen, widths)
