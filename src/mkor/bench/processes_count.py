"""What passes between processes: every collective as torch runs it, and what the kernel sends."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import UsageError

KINDS = ("gradients", "statistics", "inverses", "preconditioned", "other")
_KIND_OF_SPAN = {
    "mkor.reduce": "statistics",
    "mkor.update": "inverses",
    "mkor.precondition": "preconditioned",
}
# The place of its process group among an operator's arguments, and of what it sends.
_GROUP, _SENDS = 1, 0
_GROUP_OF_TWO, _SENDS_OF_TWO = 2, 1
_ONE_LIST = {"allreduce_", "allreduce_coalesced_", "broadcast_"}
_TWO_LISTS = {
    "_allgather_base_",
    "_reduce_scatter_base_",
    "allgather_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_",
}
_EMPTY = {"barrier", "monitored_barrier_", "check_for_nan"}

# Linux's `struct tcp_info`: where the bytes sent and those of them sent again are.
_INFO_BYTES, _SENT, _AGAIN = 256, 200, 208


@dataclass(frozen=True)
class Collective:
    """One collective of one process.

    Attributes:
        name: Of torch's operator.
        kind: One of `KINDS`.
        handed: Bytes that this process puts in; what it only receives does not count.
        wire: Bytes that a process sends for it on average, where the algorithm is optimal.
    """

    name: str
    kind: str
    handed: int
    wire: float


def bytes_of(tensors: object) -> int:
    """Size of tensors.

    Args:
        tensors: One, or sequences of such.

    Returns:
        Bytes.
    """
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, Sequence):
        return sum(bytes_of(tensor) for tensor in tensors)
    return 0


def wire_bytes(name: str, size: int, members: int) -> float:
    """What a process sends on average for a collective.

    Args:
        name: Of torch's operator.
        size: Bytes of its input: of each process, for a broadcast of the one that has it.
        members: Processes that take part.

    Returns:
        Bytes.
    """
    others = members - 1
    if name.startswith("allreduce"):
        return 2 * others / members * size
    if "allgather" in name:
        return float(others * size)
    return others / members * size


class Counter(TorchDispatchMode):
    """Sees every collective on its way through torch's dispatcher, those of DDP's reducer too.

    What a collective is for shows in its process group, which is torch's own for gradients, and in
    the range of the profile it runs in; so a profiler has to run.

    Attributes:
        seen: All so far.
    """

    def __init__(self) -> None:
        """Begins with nothing seen."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Collective] = []
        self._open: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Notes an operator and runs it.

        Args:
            func: The operator.
            types: Of its tensors.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            What the operator returns.
        """
        space, _, name = func._schema.name.partition("::")
        if space == "profiler":
            self._follow(name, args)
        elif "c10d" in space and name not in _EMPTY:
            self._note(space, name, args)
        return func(*args, **(kwargs or {}))

    def _follow(self, name: str, args: Sequence[Any]) -> None:
        if name.startswith("_record_function_enter"):
            self._open.append(args[0])
        elif self._open:
            self._open.pop()

    def _note(self, space: str, name: str, args: Sequence[Any]) -> None:
        if space != "c10d" or name not in _ONE_LIST | _TWO_LISTS:
            known = ", ".join(sorted(_ONE_LIST | _TWO_LISTS))
            raise UsageError(
                f"cannot count what {space}::{name} sends; choose a contestant whose collectives "
                f"are among: {known}."
            )
        one = name in _ONE_LIST
        group = dist.ProcessGroup.unbox(args[_GROUP if one else _GROUP_OF_TWO])
        size = bytes_of(args[_SENDS if one else _SENDS_OF_TWO])
        root = args[2] if name == "broadcast_" else group.rank()
        handed = size if root == group.rank() else 0
        wire = wire_bytes(name, size, group.size())
        self.seen.append(Collective(name, self._kind(group), handed, wire))

    def _kind(self, group: dist.ProcessGroup) -> str:
        for name in reversed(self._open):
            if name in _KIND_OF_SPAN:
                return _KIND_OF_SPAN[name]
            if name.startswith("Optimizer.step"):
                return "other"
        default = dist.group.WORLD
        alike = default is not None and group.group_name == default.group_name
        return "gradients" if alike else "statistics"


def kernel_bytes(leave_out: int) -> int | None:
    """What the kernel has sent for this process over TCP connections that are open now.

    Args:
        leave_out: Connections to or from this port do not count.

    Returns:
        Bytes, headers of packets and repetitions left out; None where the system does not tell.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                total += _sent_over(connection, leave_out)
        except OSError:
            # Closed in the meantime, or not connected.
            continue
    return total


def _sent_over(connection: socket.socket, leave_out: int) -> int:
    families = (socket.AF_INET, socket.AF_INET6)
    if connection.family not in families or connection.type != socket.SOCK_STREAM:
        return 0
    if leave_out in (connection.getsockname()[1], connection.getpeername()[1]):
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _AGAIN + 8:
        return 0
    sent: int = struct.unpack_from("Q", info, _SENT)[0]
    again: int = struct.unpack_from("Q", info, _AGAIN)[0]
    return sent - again


def counted(step: Callable[[], None], steps: int) -> list[Collective]:
    """Runs steps and counts their collectives.

    Args:
        step: Takes one.
        steps: How many.

    Returns:
        All collectives of all steps.
    """
    # A running profiler is what makes the ranges visible.
    activities = [torch.profiler.ProfilerActivity.CPU]
    counter = Counter()
    with torch.profiler.profile(activities=activities), counter:
        for _ in range(steps):
            step()
    return counter.seen
