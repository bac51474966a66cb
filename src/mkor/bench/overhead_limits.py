"""The least that the parts of MKOR's step can take on this machine, and how near they are.

Three bounds, from three figures measured in the same run: bytes that have to move over bandwidth,
operations that have to be done over the speed of a large product, and, which is no bound in
principle but one in practice, calls of operators times what the smallest takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mkor

from .timing import Timing
from .training import state_bytes
from .worker import Worker

# Working sets whose bandwidth is measured: from a core's own cache to memory.
WORKING_SETS = tuple(1 << power for power in range(16, 29, 2))
PRODUCT = 1024
# A figure is the best of repeated measurements that take so long together.
SECONDS, FEWEST = 0.2, 5
CALLS = 1000
# Smaller copies are repeated until they come to so many bytes.
CHUNK = 1 << 20
FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """What the machine is able to do, with the threads in use.

    Attributes:
        bandwidth: Bytes read and written in a second of copying, by size of the working set.
        operations: Floating-point operations a second of a large product.
        call: Seconds of the smallest operator.
    """

    bandwidth: dict[int, float]
    operations: float
    call: float

    def moving(self, count: float) -> float:
        """The time that bytes take to move.

        Args:
            count: How many; together they are the working set.

        Returns:
            Seconds.
        """
        size = next((size for size in self.bandwidth if size >= count), max(self.bandwidth))
        return count / self.bandwidth[size]


@dataclass(frozen=True)
class Layer:
    """A preconditioned layer.

    Attributes:
        d_out: Rows of its weight.
        d_in: Columns of its weight.
        bias: Whether it has a preconditioned bias.
        rank: Vectors kept per side.
        used: Entries of the inputs and of the output gradients that statistics are made of, at
            least: of images whole lines are used.
    """

    d_out: int
    d_in: int
    bias: bool
    rank: int
    used: int


@dataclass(frozen=True)
class Limit:
    """A part's bounds.

    Attributes:
        part: The part.
        bytes: That have to move.
        operations: That have to be done.
        calls: Of operators, as they were counted.
        bytes_ms: Bound by the bytes.
        operations_ms: Bound by the operations.
        calls_ms: What so many of the smallest calls take.
        measured_ms: What the part took.
    """

    part: str
    bytes: float
    operations: float
    calls: float
    bytes_ms: float
    operations_ms: float
    calls_ms: float
    measured_ms: float

    @property
    def near(self) -> float:
        """The larger bound, of bytes or operations, over the time that was measured."""
        return max(self.bytes_ms, self.operations_ms) / self.measured_ms


def best(work: Callable[[], object], device: str = "cpu") -> float:
    """The shortest time of a repeated piece of work.

    Args:
        work: The work.
        device: Where it runs.

    Returns:
        Wall seconds: a bound must not be made of moments when others had the processor.
    """
    times: list[float] = []
    while len(times) <= FEWEST or sum(times) < SECONDS:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def measure_machine(device: str = "cpu") -> Machine:
    """Measures bandwidth, speed and the cost of a call.

    Args:
        device: Where.

    Returns:
        The figures.
    """
    bandwidth = {size: copying(size, device) for size in WORKING_SETS}
    square = torch.randn(PRODUCT, PRODUCT, device=device)
    product = torch.empty_like(square)
    operations = 2 * PRODUCT**3 / best(lambda: torch.mm(square, square, out=product), device)
    one = torch.zeros(1, device=device)
    call = best(lambda: _often(one.add_, 1.0, CALLS), device) / CALLS
    return Machine(bandwidth, operations, call)


def copying(size: int, device: str) -> float:
    """The speed of copying.

    Args:
        size: Bytes that are read and written.
        device: Where.

    Returns:
        Bytes a second.
    """
    source = torch.ones(size // (2 * FLOAT), device=device)
    target = torch.empty_like(source)
    times = max(1, CHUNK // size)
    return size * times / best(lambda: _often(target.copy_, source, times), device)


def _often(work: Callable[[Any], object], argument: object, times: int) -> None:
    for _ in range(times):
        work(argument)


def layers_of(worker: Worker) -> list[Layer]:
    """The layers that a worker's optimizer preconditions.

    Args:
        worker: A worker with MKOR.

    Returns:
        The layers in the order of the model.
    """
    optimizer: Any = worker.optimizer
    rows = {row.parameter: row for row in optimizer.coverage() if row.preconditioned}
    curvature = optimizer.curvature
    chosen = curvature.vectors * curvature.rows if curvature.rows else None
    seen = _seen(worker, {name.rpartition(".")[0] for name in rows})
    layers = []
    for name, row in rows.items():
        module = name.rpartition(".")[0]
        if len(row.shape) < 2 or module not in seen:
            continue
        d_out, d_in = row.shape[0], torch.Size(row.shape[1:]).numel()
        entries, count = seen[module]
        used = entries if chosen is None else round(entries * min(1.0, chosen / count))
        layers.append(Layer(d_out, d_in, f"{module}.bias" in rows, row.rank, used))
    return layers


def _seen(worker: Worker, names: set[str]) -> dict[str, tuple[int, int]]:
    """Entries of input and output, and rows, of the modules in a forward pass."""
    seen: dict[str, tuple[int, int]] = {}
    with _hooks(worker.model, names, seen), torch.no_grad():
        worker.model(worker.batch[0])
    return seen


@contextmanager
def _hooks(model: nn.Module, names: set[str], seen: dict[str, tuple[int, int]]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and isinstance(module.weight, Tensor):
                entries = inputs[0].numel() + output.numel()
                seen[name] = (entries, output.numel() // len(module.weight))

        return look

    modules = ((name, module) for name, module in model.named_modules() if name in names)
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_work(worker: Worker, base: Worker) -> dict[str, tuple[float, float]]:
    """Bytes that have to move and operations that have to be done.

    Args:
        worker: A worker with MKOR.
        base: One with its base alone.

    Returns:
        Both by part. Capture reads the chosen rows and leaves `k` vectors a side; the gradients
        are read for their norms; an update reads the vectors, writes them to the window and
        multiplies them with it; preconditioning factors an `r x r` matrix a side, whitens the
        window, and takes `4 r d_out d_in` operations a side; the base reads and writes its state
        and the weights, and reads the gradients.
    """
    optimizer: Any = worker.optimizer
    k, sides = optimizer.curvature.vectors, _sides(optimizer)
    capture = measure = update = precondition = update_work = work = 0.0
    for layer in layers_of(worker):
        r = layer.rank
        for width in _widths(layer, sides):
            vectors, window = k * width * FLOAT, r * width * FLOAT
            capture += layer.used * FLOAT / 2 + vectors
            update += 2 * vectors + window + 2 * k * r * FLOAT
            update_work += 2 * k * r * width
            precondition += window + r * r * FLOAT
            work += 2 * r**3 / 3 + 2 * r * r * width
            work += 4 * r * layer.d_out * (layer.d_in + layer.bias)
        gradient = layer.d_out * (layer.d_in + layer.bias) * FLOAT
        measure += gradient
        precondition += 2 * gradient
    weights = base.model_bytes() / 2
    stepped = 3 * weights + 2 * state_bytes(base.optimizer)
    return {
        "mkor.capture": (capture, 0.0),
        "mkor.measure": (measure, 0.0),
        "mkor.update": (update, update_work),
        "mkor.precondition": (precondition, work),
        "mkor.base_step": (stepped, 0.0),
    }


def _sides(optimizer: Any) -> Sequence[str]:
    names = {key for entry in optimizer.state.values() for key in entry}
    return [side for side in ("left", "right") if f"mkor_{side}_rows" in names]


def _widths(layer: Layer, sides: Sequence[str]) -> list[int]:
    return [layer.d_out if side == "left" else layer.d_in for side in sides]


def has_limits(worker: Worker) -> bool:
    """Whether a worker's bounds are known.

    Args:
        worker: The worker.

    Returns:
        True for MKOR while it is at work.
    """
    optimizer = worker.optimizer
    return (
        isinstance(optimizer, mkor.Preconditioned)
        and isinstance(optimizer.curvature, mkor.Window)
        and optimizer.switched_at is None
    )


def limits_of(worker: Worker, base: Worker, timing: Timing, machine: Machine) -> list[Limit]:
    """The bounds of the parts of MKOR's step.

    Args:
        worker: A worker with MKOR.
        base: One with its base alone.
        timing: What the worker's parts took.
        machine: What the machine is able to do.

    Returns:
        One for each part that was measured.
    """
    found = []
    for part, (count, operations) in least_work(worker, base).items():
        if part not in timing.parts_ms:
            continue
        calls = timing.counts.operators_in.get(part, 0.0)
        found.append(
            Limit(
                part,
                count,
                operations,
                calls,
                bytes_ms=1e3 * machine.moving(count),
                operations_ms=1e3 * operations / machine.operations,
                calls_ms=1e3 * calls * machine.call,
                measured_ms=timing.parts_ms[part],
            )
        )
    return found
