"""The private and unstable parts of torch that the package needs, each behind a name of its own.

``torch._foreach_*`` and ``Module._parameters`` are used where they are needed, as torch.optim does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import profiler
from torch.nn.parallel import DistributedDataParallel

_NO_SPAN = nullcontext()

# Named so from torch 2.13 on.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread; -1 outside of any."""
    task: int = torch._C._current_graph_task_id()
    return task


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function when the backward pass that is running ends."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def is_transformed() -> bool:
    """Whether code runs under ``torch.func``, on tensors that hide others."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether a gradient stands for several passes at once (``is_grads_batched``)."""
    return type(grad) is Tensor and not torch._C._has_storage(grad)


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves now goes through hooks (checkpointing, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_tracing() -> bool:
    """Whether tensors that are made now hold no numbers, or hold them in replays only."""
    if torch.compiler.is_compiling():
        return True
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return fake or is_capturing()


def is_capturing(tensor: Tensor | None = None) -> bool:
    """Whether what is launched now, on a tensor's device or on any, goes into a CUDA graph."""
    # Asking the driver raises where there is none; until something runs there, nothing is captured.
    gpu = torch.cuda.is_initialized() if tensor is None else tensor.is_cuda
    return gpu and bool(torch.cuda.is_current_stream_capturing())


def refuse_capture(reason: str) -> NoReturn:
    """Raise a RuntimeError that says why a step cannot be captured in a CUDA graph."""
    raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}")


def full_precision(kinds: Iterable[str]) -> ExitStack:
    """Autocast off on devices of these types, for a step that is taken inside it."""
    stack = ExitStack()
    if torch._C._is_any_autocast_enabled():
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def span(name: str) -> AbstractContextManager[object]:
    """A named range in traces of ``torch.profiler``; free while no profiler runs."""
    if profiler._is_profiler_enabled and not torch.compiler.is_compiling():
        return torch.profiler.record_function(name)
    return _NO_SPAN


def guard_hooks_in_compiled_code() -> None:
    """Keep compiled code of hooked modules apart from that of others of the same class."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def running_ddp() -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` whose forward pass is running."""
    return DistributedDataParallel._active_ddp_module


def packs_projections(module: nn.MultiheadAttention) -> bool:
    """Whether the projections of queries, keys and values are one parameter."""
    return bool(module._qkv_same_embed_dim)


def is_transposed_convolution(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution of any dimension."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether ``distribute_module`` has spread a module's parameters."""
    return bool(getattr(module, "_distribute_module_applied", False))


def takes(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a group's backend takes tensors of a device's type."""
    return torch.device(device.type) in group._device_types


def small_device(group: dist.ProcessGroup) -> torch.device:
    """Where a group's backend takes small tensors from: the CPU if it can."""
    kinds = group._device_types
    return torch.device("cpu") if torch.device("cpu") in kinds else kinds[0]


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """A group's time-out, which groups made from it do not take over by themselves."""
    options = getattr(group._get_backend(small_device(group)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
