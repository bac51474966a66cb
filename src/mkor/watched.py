"""A model under watch: all that depends on its present parameters.

These are the selection of layers, the buffer for their statistics, their groups with factors, and
their hooks. When parameters come, go or are replaced, another one takes its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mkor import _torch
from mkor._warn import warn
from mkor.capture.buffer import BufferLayout, LayerSlot, StatisticsBuffer, Totals
from mkor.capture.functional import FunctionalLinearHook
from mkor.capture.hooks import AccumulationHook, DetachableHook, ForwardHook
from mkor.capture.output_layer import EagerUntilFound, OutputSearch
from mkor.capture.passes import CaptureContext
from mkor.curvature.base import Curvature, Inverting
from mkor.distributed.communicator import Communicator
from mkor.distributed.fsdp import Shard, shard_of
from mkor.distributed.kaisa import Assignment
from mkor.layers.layer import SIDES, GroupShape, Layer
from mkor.layers.rows import RowSelection
from mkor.layers.selection import Skip, select
from mkor.step.groups import LayerGroup
from mkor.step.table import LayerTable

MAX_SILENT_STEPS = 10
"""Steps without a capture before the device is asked whether compiled code captured any."""

_watching: weakref.WeakKeyDictionary[nn.Module, weakref.ref[WatchedModel]] = (
    weakref.WeakKeyDictionary()
)


class WatchedModel:
    """Hooks on the layers of a model, and the groups their statistics go to.

    Args:
        model: The model.
        parameters: The base optimizer's.
        curvature: The kind of factor.
        context: Shared by the hooks.
        vectors: Vectors that this process adds to in an update.
        sides: The sides in use.
        skip: What the user leaves to the base.
        skip_output: Whether the layers next to the loss are left to the base.
        communicator: The processes that train together.
        gather: Whether every process contributes vectors of its own.
        close: Closes the owner, if it lives, when another takes its layers over.

    Attributes:
        selection: What was chosen in the model.
        tables: Of the preconditioned layers, one per device and dtype.
        groups: The layers by shape.
        selections: For each table, which rows its layers use; they hold the update counts.
        buffer: Their sums, by this process and by all.
        assignment: Who inverts what for others; None where every process inverts all it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        curvature: Curvature,
        context: CaptureContext,
        vectors: int,
        sides: str,
        skip: Skip,
        skip_output: bool,
        communicator: Communicator,
        gather: bool,
        close: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        self._context, self._curvature, self._communicator = context, curvature, communicator
        self._skip_output, self._close_owner = skip_output, close
        self._sides = tuple(side for side in SIDES if sides in ("both", side))
        self._handles: list[Any] = []
        self._eager: EagerUntilFound | None = None
        self._silent_steps = 0
        self._just_decided = self._closed = False
        self.selection = select(model, parameters, skip)
        chosen = [layer for layer in self.selection.layers if not layer.reason]
        self.assignment = None
        if isinstance(curvature, Inverting) and communicator.world_size > 1:
            self.assignment = Assignment(communicator, curvature.grad_worker_fraction)
        self.buffer = context.passes.buffer = StatisticsBuffer(communicator, gather)
        self.tables: list[LayerTable] = []
        self.groups: list[LayerGroup] = []
        self.selections: list[RowSelection] = []
        self._layouts: list[BufferLayout] = []
        self._allocate(self._keyed(chosen), vectors)
        self._claim(chosen)
        if not chosen:
            warn("no layer of this model is preconditioned; print(optimizer.coverage()) says why")
        elif skip_output:
            context.search = OutputSearch()
            self._eager = EagerUntilFound()
        _torch.guard_hooks_in_compiled_code()
        self._install()
        self._finalizer = weakref.finalize(self, _release, self._handles, context, self._eager)

    # ------------------------------------------------------------------------------ allocation

    def _keyed(self, layers: Sequence[Layer]) -> dict[tuple[Any, ...], list[Layer]]:
        """Layers by shape, shard and inverter."""
        inverters = [0] * len(layers)
        if self.assignment is not None:
            kinds = [(layer.kind, layer.has_bias) for layer in layers]
            costs = [float(k.d_out**3 + (k.d_in + has_bias) ** 3) for k, has_bias in kinds]
            inverters = self.assignment.inverters(costs)
        groups: dict[tuple[Any, ...], list[Layer]] = {}
        for layer, inverter in zip(layers, inverters, strict=True):
            shard = shard_of(layer.weight, layer.bias, layer.spec.transposed, layer.name)
            if shard is not None and self.assignment and self.assignment.shares_gradients:
                raise ValueError(
                    "grad_worker_fraction below 1 needs processes that hold whole gradients, as "
                    f"under DistributedDataParallel, but {layer.name} is sharded: use 1.0"
                )
            groups.setdefault((self._shape(layer), shard, inverter), []).append(layer)
        return groups

    def _shape(self, layer: Layer) -> GroupShape:
        weight, kind = layer.weight, layer.kind
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        bias = layer.bias is not None
        return GroupShape(0, kind.d_out, kind.d_in, bias, self._sides, dtype, weight.device)

    def _allocate(self, keyed: dict[tuple[Any, ...], list[Layer]], vectors: int) -> None:
        """Tables, groups and slots."""
        captured = "right" in self._sides, "left" in self._sides
        for place in dict.fromkeys((shape.dtype, shape.device) for shape, _, _ in keyed):
            here = [
                (replace(key[0], layers=len(layers)), *key[1:], layers)
                for key, layers in keyed.items()
                if (key[0].dtype, key[0].device) == place
            ]
            shapes = [shape for shape, *_ in here]
            layout = BufferLayout(shapes, vectors, captured, self._curvature.covariance)
            a, g, numbers = layout.views(self.buffer.add_flat(layout.size, *place))
            table = LayerTable(shapes, self._curvature)
            count = torch.zeros((), dtype=torch.int64, device=place[1])
            selection = RowSelection(vectors, count)
            groups = []
            for i, (shape, shard, inverter, layers) in enumerate(here):
                rows = numbers[table.factors.spans[i]]
                slots = self._slots(layers, (a[i], g[i], rows), selection, shard)
                group = LayerGroup(layers, shape, slots, table, i, shard, inverter)
                if self.assignment is not None:
                    group.keeps = self.assignment.preconditions(inverter)
                groups.append(group)
            table.begin_factors([group.first_state(self._curvature) for group in groups])
            self.tables.append(table)
            self.groups += groups
            self.selections.append(selection)
            self._layouts.append(layout)

    def _slots(
        self,
        layers: Sequence[Layer],
        sums: tuple[Tensor, Tensor, Tensor],
        selection: RowSelection,
        shard: Shard | None,
    ) -> list[LayerSlot]:
        views = zip(*(tensor.unbind() for tensor in sums), strict=True)
        return [
            LayerSlot(layer.kind, a, g, numbers, selection, shard is not None)
            for layer, (a, g, numbers) in zip(layers, views, strict=True)
        ]

    # ------------------------------------------------------------------------- what a step needs

    @property
    def in_cuda_graph(self) -> bool:
        """Whether a step that is taken now goes into a CUDA graph."""
        return any(_torch.is_capturing(selection.update) for selection in self.selections)

    def totals(self) -> list[tuple[LayerTable, Totals]]:
        """The sums of an update, once they were reduced, for each table."""
        return [
            (table, layout.totals(self.buffer.totals(i)))
            for i, (table, layout) in enumerate(zip(self.tables, self._layouts, strict=True))
        ]

    def count(self, updates: int) -> None:
        """Tell the devices how many updates there were, where they cannot know."""
        for selection in self.selections:
            selection.update.fill_(updates)

    def advance(self) -> None:
        """Count an update on the devices themselves, for replays of a CUDA graph count there."""
        for selection in self.selections:
            selection.update.add_(1)

    def begin(self, wanted: bool, rows: int | None, replayed: bool) -> None:
        """Prepare for the next step.

        It takes an update if that is ``wanted``, of so many rows per part and pass; ``replayed``
        says whether CUDA graphs may end steps by themselves.
        """
        for selection in self.selections:
            selection.begin(rows, shares=not replayed)
        self._context.want(wanted)

    def drop_captures(self) -> None:
        """Drop what was captured since the last step."""
        self._context.calls = 0
        self._context.passes.begin()
        self.buffer.clear()

    def reset_factors(self) -> None:
        """Start the factors anew, released ones too; what is known of the outputs stays."""
        for table in self.tables:
            mine = [group for group in self.groups if group.table is table]
            table.begin_factors([group.first_state(self._curvature) for group in mine])

    def recover(self) -> None:
        """After loading, make anew what the process that saved it had left to others."""
        if isinstance(self._curvature, Inverting):
            for group in self.groups:
                if group.keeps and not group.is_left:
                    self._curvature.recover(group.state)

    def check_captures(self) -> None:
        """Notice hooks that never run, without asking the device in every step."""
        if self._silent_steps < 0 or not self._context.passes.most:
            return
        if self._context.calls:
            # The search ran eagerly, so it says nothing of what compiled code captures.
            self._silent_steps = 0 if self._just_decided else -1
            self._just_decided = False
            return
        self._silent_steps += 1
        if self._silent_steps < MAX_SILENT_STEPS:
            return
        if any(bool(totals.scalars.any()) for _, totals in self.totals()):
            self._silent_steps = -1
            return
        raise RuntimeError(
            f"{MAX_SILENT_STEPS} updates had gradients but not one layer's hook ran: wrap the "
            "optimizer before the first call of a compiled model, or of another of its class (or "
            "call torch.compiler.reset() and compile again), and do not remove the model's forward "
            "hooks"
        )

    # ------------------------------------------------------------------------- the output layers

    def decide_outputs(self) -> bool:
        """Find the output layers once a backward pass has run, the same on all processes.

        Returns whether they were found just now.
        """
        search = self._context.search
        if search is None:
            return False
        names = [layer.name for layer in self.selection.layers]
        outputs = search.outputs()
        votes = [[float(name in search.reached), float(name in outputs)] for name in names]
        reached, output = self._communicator.sum_small(torch.tensor(votes, device="cpu")).T.tolist()
        if not any(reached):
            return False
        # Unanimous among the processes that used the layer.
        seen = {n for n, r in zip(names, reached, strict=True) if r}
        decided = {n for n, r, o in zip(names, reached, output, strict=True) if r == o > 0}
        for group in self.groups:
            before = group.state["output"].tolist()
            flags = [
                int(layer.name in decided) if layer.name in seen else max(0, known)
                for layer, known in zip(group.layers, before, strict=True)
            ]
            group.state["output"].copy_(torch.tensor(flags, device="cpu"))
        self._just_decided = True
        self.apply_decision()
        return True

    def apply_decision(self) -> None:
        """Act on the decision recorded in the groups' state, if there is one."""
        flags = [group.state["output"].tolist() for group in self.groups]
        if not flags or any(flag < 0 for group in flags for flag in group):
            return
        for group, known in zip(self.groups, flags, strict=True):
            group.leave([self._skip_output and bool(flag) for flag in known])
        if all(group.is_left for group in self.groups):
            warn(
                "no layer of this model is preconditioned: all that could be are next to the "
                "loss; pass skip_output=False to include them"
            )
        self._end_search()
        self._install()

    def _end_search(self) -> None:
        self._context.search = None
        if self._eager is not None:
            self._eager.release()

    # ------------------------------------------------------------------- another watch, and the end

    def sums(self) -> dict[str, list[Tensor]]:
        """What was captured since the last step, by layer."""
        self.buffer.recall()
        return {
            layer.name: [slot.a, slot.g, slot.numbers]
            for group in self.groups
            for layer, slot in zip(group.layers, group.slots, strict=True)
        }

    def take_over(self, sums: dict[str, list[Tensor]], search: OutputSearch | None) -> None:
        """Go on with what another watch of the model captured, and with its search.

        Layers may have come, gone, or got other weights since.
        """
        for name, mine in self.sums().items():
            for new, old in zip(mine, sums.get(name, ()), strict=False):
                if new.shape == old.shape:
                    new.copy_(old)
        if self._context.search is not None and search is not None:
            self._context.search = search

    def close(self, claim: bool = False) -> None:
        """Take the hooks off and free the factors.

        With ``claim``, the layers still belong to the owner, who has switched to its base.
        """
        self._closed = not claim
        self._finalizer.detach()
        _release(self._handles, self._context, None)
        self._end_search()
        self.groups, self.tables, self.selections, self._layouts = [], [], [], []
        self.buffer = self._context.passes.buffer = StatisticsBuffer(self._communicator, False)

    def _claim(self, chosen: Iterable[Layer]) -> None:
        """Be the only watch of these layers."""
        for module in (m for layer in chosen for m in layer.modules):
            reference = _watching.get(module)
            other = None if reference is None else reference()
            mine = other is None or other is self or other._closed
            close = None if other is None or mine else other._close_owner()
            if close is not None:
                warn(
                    "another wrapper already watches this model; it is closed and the new one "
                    "takes over"
                )
                close()
            _watching[module] = weakref.ref(self)

    # ------------------------------------------------------------------------------------ hooks

    def _install(self) -> None:
        _remove(self._handles)
        slots = {
            layer.name: slot
            for group in self.groups
            for layer, slot, skipped in zip(group.layers, group.slots, group.skipped, strict=True)
            if not skipped
        }
        context = self._context
        for layer in self.selection.layers:
            slot = slots.get(layer.name)
            if slot is None and context.search is None:
                continue
            for module in layer.modules:
                self._hook(module, self._hook_of(layer, slot))
            if slot is not None and layer.weight.requires_grad:
                counter = AccumulationHook(context, layer.name, slot.sharded)
                self._handles.append(layer.weight.register_post_accumulate_grad_hook(counter))
        if context.search is not None:
            for name, module in self.selection.others.items():
                self._hook(module, ForwardHook(context, name, None))

    def _hook_of(self, layer: Layer, slot: LayerSlot | None) -> DetachableHook:
        if layer.spec.functional:
            last = layer.spec.name == "out_proj"
            return FunctionalLinearHook(self._context, layer, slot, last)
        return ForwardHook(self._context, layer.name, slot)

    def _hook(self, module: nn.Module, hook: Any) -> None:
        # fully_shard's own hook takes the whole weights away, by which products are recognised.
        first = isinstance(hook, FunctionalLinearHook)
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
        self._handles.append(handle)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _release(handles: list[Any], context: CaptureContext, eager: EagerUntilFound | None) -> None:
    _remove(handles)
    context.want(False)
    context.search = None
    context.passes.early = False
    if eager is not None:
        eager.release()
