"""`mkor overhead --processes`: the bytes that processes send each other in a training step.

Every collective passes torch's dispatcher, those of DDP's reducer too, and is counted there.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cli import UsageError, prepare_file
from .contestants import Contestant, check_all, options_of
from .models import Worker, make_subject
from .results import FORMAT, environment, write_record
from .show import bytes_text, print_table

KINDS = ("gradients", "statistics", "inverses", "preconditioned", "other")
_KIND_OF_RANGE = {
    "mkor.reduce": "statistics",
    "mkor.update": "inverses",
    "mkor.precondition": "preconditioned",
}
# Collectives whose first argument is what is sent, and those whose first is what is received.
_IN_PLACE = {"allreduce_", "allreduce_coalesced_", "broadcast_"}
_OUT_OF_PLACE = {"_allgather_base_", "_reduce_scatter_base_", "allgather_", "reduce_scatter_"}
_OUT_OF_PLACE |= {f"{name}_coalesced_" for name in ("allgather", "allgather_into_tensor")}
_OUT_OF_PLACE |= {"reduce_scatter_tensor_coalesced_"}
_EMPTY = {"barrier", "monitored_barrier_", "check_for_nan"}
# The first step compares set-ups, and the first ones sort DDP's buckets.
WARMUP_STEPS = 3
MEET, TOTAL = timedelta(seconds=120), 3600.0
UNUSED = {"plot": None, "bf16": False, "device": "cpu", "rounds": 30}
NOTE = """
bytes that a process hands to collectives in a step (a broadcast counts for who has the data), mean
over processes and over the steps between two updates; beside gradients: all other kinds over the
gradients' bytes; formula: what these should be for the layers that are preconditioned, but for
counts of rows and sums of squares, and sums of output layers, which are left to the base; sends:
what optimal algorithms make a process send (2 n (W-1)/W for an all-reduce of n bytes, W processes)
"""


class Ranges(TorchDispatchMode):
    """A dispatch mode that knows the profiler's open ranges; a profiler has to run."""

    def __init__(self) -> None:
        """Starts outside of all ranges."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[str] = []

    def follow(self, name: str, args: Sequence[Any]) -> None:
        """Takes notice of one of the operators `profiler::...`."""
        if name.startswith("_record_function_enter"):
            self.open.append(args[0])
        elif self.open:
            self.open.pop()


@dataclass(frozen=True)
class Collective:
    """One collective of one process: bytes handed over, and bytes sent by an optimal algorithm."""

    kind: str
    handed: int
    wire: float


class Collectives(Ranges):
    """Notes every collective; its process group and its range tell what it is for."""

    def __init__(self) -> None:
        """Starts with nothing seen."""
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Notes an operator and runs it."""
        space, _, name = func._schema.name.partition("::")
        if space == "profiler":
            self.follow(name, args)
        elif "c10d" in space and name not in _EMPTY:
            self._note(space, name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, space: str, name: str, args: Sequence[Any]) -> None:
        if space != "c10d" or name not in _IN_PLACE | _OUT_OF_PLACE:
            raise UsageError(
                f"cannot count what {space}::{name} sends; choose a contestant whose collectives "
                f"are among: {', '.join(sorted(_IN_PLACE | _OUT_OF_PLACE))}."
            )
        place = 0 if name in _IN_PLACE else 1
        sent = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in sent)
        group = dist.ProcessGroup.unbox(args[place + 1])
        members, others = group.size(), group.size() - 1
        # Of an average process: a ring's all-reduce, a gather's relays, a scatter or broadcast.
        wire = 2 * others / members if name.startswith("allreduce") else others / members
        wire = others if "allgather" in name else wire
        receives = name == "broadcast_" and args[2] != group.rank()
        self.seen.append(Collective(self._kind(group), 0 if receives else size, wire * size))

    def _kind(self, group: dist.ProcessGroup) -> str:
        for name in reversed(self.open):
            if name in _KIND_OF_RANGE:
                return _KIND_OF_RANGE[name]
            if name.startswith("Optimizer.step"):
                return "other"
        default = dist.group.WORLD
        alike = default is not None and group.group_name == default.group_name
        return "gradients" if alike else "statistics"


@contextmanager
def collectives() -> Iterator[list[Collective]]:
    """Counts collectives inside; a running profiler is what makes ranges visible."""
    running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with running, Collectives() as counter:
        yield counter.seen


def period(contestant: Contestant) -> int:
    """Steps after which what is sent repeats itself."""
    options = options_of(contestant).get("wrapper", {})
    return int(options.get("inverse_every") or options.get("update_every") or 1)


def formula(
    contestant: Contestant, layers: Sequence[tuple[int, int]], processes: int
) -> dict[str, float]:
    """Numbers by kind that a process hands over in a step for layers `(d_out, d_in)`, mean."""
    # Window, dense and Eva send k (d_in + d_out) an update, KFAC d_in^2 + d_out^2. With KAISA
    # (Pauloski et al., SC 2021) one process broadcasts a layer's inverses if several precondition
    # the layer, and each of those its preconditioned gradient if others do not.
    if contestant.wrapper is None:
        return {}
    options: dict[str, Any] = options_of(contestant)["wrapper"]
    updates, sides = int(options.get("update_every") or 1), options.get("sides") or "both"
    use_out, use_in = sides in ("both", "left"), sides in ("both", "right")
    if contestant.wrapper.name != "kfac":
        # Eva has no such option: it takes one mean.
        k = int(options.get("vectors") or 1)
        k = -(-k // processes) if options.get("reduce") == "gather" else k
        vectors = sum(use_out * d_out + use_in * d_in for d_out, d_in in layers)
        return {"statistics": k * vectors / updates}
    matrices = sum(use_out * d_out**2 + use_in * d_in**2 for d_out, d_in in layers)
    workers = max(1, round(float(options.get("grad_worker_fraction") or 1.0) * processes))
    found = {"statistics": matrices / updates}
    if workers > 1:
        found["inverses"] = matrices / processes / int(options.get("inverse_every") or updates)
    if workers < processes:
        weights = sum(d_out * d_in for d_out, d_in in layers)
        found["preconditioned"] = workers / processes * weights
    return found


@dataclass(frozen=True)
class Traffic:
    """What a contestant's processes send, in bytes per step and process (means)."""

    contestant: str
    gradients: int
    kinds: dict[str, float]
    formula: dict[str, float]
    share: float
    wire: float
    calls: float
    layers: list[tuple[int, int]]


def count(contestant: Contestant, arguments: argparse.Namespace) -> Traffic:
    """Trains with DDP in each of the processes and counts; all get the means over processes."""
    worker = Worker(contestant, make_subject(arguments))
    worker.model = DistributedDataParallel(worker.model)
    for _ in range(WARMUP_STEPS):
        worker.iterate()
    steps, world = period(contestant), dist.get_world_size()
    with collectives() as seen:
        for _ in range(steps):
            worker.iterate()
    sums = torch.zeros(len(KINDS) + 2, dtype=torch.float64)
    for each in seen:
        sums[KINDS.index(each.kind)] += each.handed
        sums[-2] += each.wire
        sums[-1] += 1
    dist.all_reduce(sums)
    *kinds, wire, calls = (sums / steps / world).tolist()
    weights = [weight for weight in worker.model.parameters() if weight.requires_grad]
    gradients = sum(weight.numel() * weight.element_size() for weight in weights)
    layers = worker.layers()
    return Traffic(
        contestant.label,
        gradients,
        {kind: size for kind, size in zip(KINDS, kinds, strict=True) if size},
        {kind: 4 * size for kind, size in formula(contestant, layers, world).items()},
        (sum(kinds) - kinds[0]) / gradients,
        wire,
        calls,
        layers,
    )


def _work(rank: int, world: int, port: int, task: Any, answers: Any) -> None:
    """One of the processes; the first answers with a list of `Traffic`, or anyone with an error."""
    contestants, arguments = task
    torch.set_num_threads(arguments.threads)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, timeout=MEET)
    group = PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=MEET)
    try:
        found = [count(contestant, arguments) for contestant in contestants]
    except UsageError as error:
        answers.put(str(error))
        raise
    if rank == 0:
        answers.put(found)
    # Nobody leaves while others may still need its connections.
    if store.add("finished", 1) == world:
        store.set("all finished", "")
    store.wait(["all finished"])
    # Without the destructors of process groups, which may wait for each other.
    os._exit(0)


def run_processes(world: int, contestants: Sequence[Contestant], arguments: Any) -> list[Traffic]:
    """Counts on `world` processes of this machine; none of them outlives the call."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = mp.get_context("spawn").SimpleQueue()
    task = (contestants, arguments)
    how = (world, server.port, task, answers)
    together = spawn(_work, how, world, join=False, daemon=True)
    deadline = time.monotonic() + TOTAL
    try:
        while not together.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise UsageError("the processes take too long; try a smaller model.")
    except ProcessException as error:
        told = answers.get() if not answers.empty() else f"a process failed: {error}"
        raise UsageError(told) from error
    finally:
        for process in together.processes:
            process.kill()
            process.join()
    found: list[Traffic] = answers.get()
    return found


def print_traffic(found: Sequence[Traffic], stream: TextIO) -> None:
    """Prints a row for each contestant."""
    kinds = [kind for kind in KINDS if any(kind in traffic.kinds for traffic in found)]
    rows = [
        (
            each.contestant,
            *(bytes_text(each.kinds[kind]) if kind in each.kinds else "" for kind in kinds),
            f"{each.share:.3%}",
            f"{sum(each.formula.values()) / each.gradients:.3%}",
            bytes_text(each.wire),
            f"{each.calls:.1f}",
        )
        for each in found
    ]
    headers = ("contestant", *kinds, "beside gradients", "formula", "sends", "collectives")
    print_table(headers, rows, stream)
    print(NOTE, file=stream)


def bytes_sent(arguments: argparse.Namespace, contestants: Sequence[Contestant]) -> int:
    """Counts what contestants send, prints and stores it; the exit status."""
    for name, default in UNUSED.items():
        if getattr(arguments, name) != default:
            raise UsageError(f"--processes counts what is sent and takes no --{name}.")
    path = prepare_file("--json", arguments.json)
    subject, world = make_subject(arguments), arguments.processes
    check_all(contestants, subject.build)
    sizes = ", ".join(f"{key} {value}" for key, value in subject.sizes.items())
    print(f"{subject.name}: {sizes}; {world} processes\n")
    found = run_processes(world, contestants, arguments)
    print_traffic(found, sys.stdout)
    if path:
        record = {
            "format": FORMAT,
            "model": {"name": subject.name, "sizes": subject.sizes},
            "processes": world,
            "backend": "gloo",
            "environment": environment(),
            "units": "bytes per step and process; layers are (d_out, d_in with the bias)",
            "contestants": [asdict(traffic) for traffic in found],
        }
        write_record(record, path)
    return 0
