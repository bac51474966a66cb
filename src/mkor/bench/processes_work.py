"""What each of several processes does: trains a few steps and counts what it sends."""

from __future__ import annotations

import argparse
import gc
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from .contestants import Contestant, Part
from .processes_count import Collective, counted, kernel_bytes
from .processes_launch import Place, Say
from .processes_models import subject_of
from .processes_theory import LayerSize, period
from .worker import Subject, Worker

# The first step compares set-ups, and the first ones sort DDP's buckets.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Request:
    """What the processes are asked to count.

    Attributes:
        contestants: Who trains.
        arguments: The parsed command line, for the model.
    """

    contestants: tuple[Contestant, ...]
    arguments: argparse.Namespace


@dataclass(frozen=True)
class Counted:
    """What one process sent for one contestant in a step, on average.

    Attributes:
        kinds: Bytes handed to collectives, by kind.
        wire: Bytes that collectives make a process send at best.
        kernel: Bytes that the kernel sent; None where it does not tell.
        calls: Collectives.
        gradients: Bytes of all gradients.
        sizes: How often each size of preconditioned layer occurs.
        layers: For each of them, bytes handed for one such layer.
    """

    kinds: dict[str, float]
    wire: float
    kernel: float | None
    calls: float
    gradients: int
    sizes: dict[LayerSize, int]
    layers: dict[LayerSize, float]


def count_all(place: Place, request: Request, say: Say) -> list[Counted]:
    """Counts for all contestants.

    Args:
        place: This process.
        request: What is asked for.
        say: Reports each contestant with its bytes.

    Returns:
        One count for each contestant.
    """
    found = []
    for contestant in request.contestants:
        found.append(_count(place, contestant, subject_of(request.arguments)))
        say((contestant.label, sum(found[-1].kinds.values())))
        # Factors of large models are not to wait for the next contestant's.
        gc.collect()
    return found


def _count(place: Place, contestant: Contestant, subject: Subject) -> Counted:
    worker = Worker(contestant, subject)
    worker.model = DistributedDataParallel(worker.model)
    seen, kernel = _run(place, worker, WARMUP_STEPS)
    covered = _covered(worker)
    kinds = _kinds(seen)
    gradients = worker.model_bytes() // 2
    del worker
    layers = {}
    if contestant.wrapper is not None:
        for size, names in covered.items():
            layers[size] = _run_without(place, contestant, contestant.wrapper, names[0], subject)
    own = sum(kinds.values()) - kinds.get("gradients", 0)
    steps = period(contestant)
    return Counted(
        kinds={kind: size / steps for kind, size in kinds.items()},
        wire=sum(each.wire for each in seen) / steps,
        kernel=None if kernel is None else kernel / steps,
        calls=len(seen) / steps,
        gradients=gradients,
        sizes={size: len(names) for size, names in covered.items()},
        layers={size: (own - without) / steps for size, without in layers.items()},
    )


def _run_without(
    place: Place, contestant: Contestant, wrapper: Part, layer: str, subject: Subject
) -> int:
    """Bytes handed where the wrapper leaves a layer to the base; without DDP, so no gradients."""
    given: Any = wrapper.options.get("skip", ())
    options = {**wrapper.options, "skip": (*given, layer)}
    without = replace(contestant, wrapper=replace(wrapper, options=options))
    seen, _ = _run(place, Worker(without, subject), 1)
    return sum(_kinds(seen).values())


def _run(place: Place, worker: Worker, warmup: int) -> tuple[list[Collective], int | None]:
    for _ in range(warmup):
        worker.iterate()
    place.meet()
    before = kernel_bytes(place.port)
    place.meet()
    seen = counted(worker.iterate, period(worker.contestant))
    place.meet()
    after = kernel_bytes(place.port)
    place.meet()
    return seen, None if before is None or after is None else after - before


def _kinds(seen: Sequence[Collective]) -> dict[str, int]:
    kinds: Tally[str] = Tally()
    for each in seen:
        kinds[each.kind] += each.handed
    return dict(kinds)


def _covered(worker: Worker) -> dict[LayerSize, list[str]]:
    """The names of the preconditioned layers, by size."""
    optimizer: Any = worker.optimizer
    if worker.contestant.wrapper is None:
        return {}
    rows = {row.parameter: row.shape for row in optimizer.coverage() if row.preconditioned}
    found: dict[LayerSize, list[str]] = {}
    for name, (d_out, *rest) in rows.items():
        if rest:
            module = name.rpartition(".")[0]
            d_in = 1
            for length in rest:
                d_in *= length
            bias = f"{module}.bias" in rows
            found.setdefault(LayerSize(d_out, d_in + bias), []).append(module)
    return found
