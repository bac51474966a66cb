"""The wrapper: capture, reduce, update, precondition, then the base optimizer's step."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mkor import checkpoint
from mkor.batches import allocate
from mkor.capture import ForwardHook, Gate
from mkor.communication import Communicator
from mkor.coverage import Coverage, report
from mkor.curvature.contract import Curvature
from mkor.output_layer import EagerUntilFound, OutputSearch
from mkor.profiling import span
from mkor.selection import Skip, select
from mkor.validation import check_base, check_model, check_options

__all__ = ["Preconditioned"]

_PATIENCE = 10
"""Steps without a capture before the wrapper asks the device whether compiled code captured any."""

_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Preconditioned]] = (
    weakref.WeakKeyDictionary()
)


class Preconditioned(Optimizer):
    """Wraps an optimizer: it steps on gradients that a curvature has preconditioned.

    From construction on it is an ordinary ``torch.optim.Optimizer``. ``state`` and ``param_groups``
    are the base's own, so schedulers and checkpoints work on either; after the first step
    ``state[weight]`` also holds the weight's factors under names that begin with ``mkor_``.

    Args:
        model: The model whose layers are watched. Hooks are installed at once: wrap before the
            first call of a compiled model.
        optimizer: The base. Must hold at least one of the model's parameters.
        curvature: The kind of factor, for instance ``mkor.Window()``.
        update_every: Steps between updates of the factors.
        rescale: What gives the preconditioned gradient its length: ``"running"``, the ratio of
            running averages of the norms before and after; ``"step"``, of the norms in this step
            (the paper, Algorithm 1, lines 9-10); None leaves it.
        skip: Modules, module types and ``fnmatch`` patterns on module names to leave to the base.
        skip_output: Leave the layers next to the loss to the base. They are found in the first
            backward pass, which therefore runs compiled models eagerly.
        sides: Which sides are preconditioned: ``"both"``, ``"left"`` (outputs), ``"right"`` (inputs).
        nonfinite: ``"propagate"`` steps on non-finite gradients as PyTorch does; ``"skip"`` leaves
            weights and base state alone in such a step, at the price of one synchronisation a step.
        process_group: For the sum of statistics; None for the default group.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        curvature: Curvature,
        *,
        update_every: int = 1,
        rescale: str | None = "running",
        skip: Skip = (),
        skip_output: bool = True,
        sides: str = "both",
        nonfinite: str = "propagate",
        process_group: Any = None,
    ) -> None:
        check_model(model)
        check_base(model, optimizer, Preconditioned)
        check_options(update_every, rescale, sides, nonfinite, skip_output)
        self._constructed = False
        super().__init__(list(checkpoint.all_parameters(optimizer.param_groups)), {})
        self.base = optimizer
        self.defaults = dict(optimizer.defaults)
        self._constructed = True

        self.curvature = curvature
        self.update_every = update_every
        self.rescale = rescale
        self.nonfinite = nonfinite
        self.loss_scale: float | Tensor = 1.0
        self._model = model
        self._skip = skip
        self._skip_output = skip_output
        self._communicator = Communicator(process_group)
        self._gate = Gate(
            curvature.vectors, curvature.rows, left=sides != "right", right=sides != "left"
        )
        self._steps = self._updates = self._silent = 0
        self._passes = 1
        self._skipped_steps = 0
        self._counters = checkpoint.counters()
        self._published = False
        self._closed = False
        self._handles: list[Any] = []
        self._eager: EagerUntilFound | None = None
        self._build()
        weakref.finalize(self, _release, self._handles, self._gate)

    # ---------------------------------------------------------------- an optimizer like any other

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._constructed:
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The base's state, with the factors of preconditioned weights after the first step."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._constructed:
            self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; layers that become trainable thereby get factors.

        Args:
            param_group: As for the base optimizer.
        """
        if not self._constructed:
            return
        self.base.add_param_group(param_group)
        if not self._closed:
            self._rebuild()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Precondition the gradients in place and step the base.

        Args:
            closure: Evaluates the model and its gradients; called once, first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._closed:
            self.base.step()
            return loss
        self._precondition()
        if self.nonfinite == "skip" and not self._gradients_finite():
            self._skipped_steps += 1
        else:
            with self._own_entries_out(), span("mkor.base_step"):
                self.base.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics captured since the last step.

        Args:
            set_to_none: Set gradients to None rather than 0.
        """
        self.base.zero_grad(set_to_none)
        self._drop_captures()

    def state_dict(self) -> dict[str, Any]:
        """The base's state and the factors, in torch's format.

        Returns:
            ``state`` and ``param_groups`` only; loads with ``torch.load(weights_only=True)``.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint of this optimizer, or of the base alone.

        A checkpoint without factors restores the base; the factors then start anew.

        Args:
            state_dict: From :meth:`state_dict`, keyed by numbers or names.

        Raises:
            ValueError: It was written by a newer version or with other settings.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        base_part, own = checkpoint.split(state_dict, self.param_groups)
        if own and not self._closed:
            first = next(iter(own.values()))
            steps, updates, passes = checkpoint.read_counters(first[checkpoint.PREFIX + "counters"])
            self._entries.copy_from(own, self._names())
            self._steps, self._updates, self._passes = steps, updates, passes
            self._read_outputs()
            self._prepare_next()
        with self._own_entries_out():
            self.base.load_state_dict(base_part)
        if own and not self._closed:
            self._publish()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds hooks on its model and cannot be copied or pickled: save "
            "state_dict(), build a new one on the other model, and load it there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()

    # ------------------------------------------------------------------------------ its own part

    def close(self) -> None:
        """Take the hooks off and free the factors; the base is an ordinary optimizer again."""
        if self._closed:
            return
        self._entries.take(self.base.state)
        self._closed = True
        _release(self._handles, self._gate)
        self._end_search()
        self._batches, self._buffers = [], []

    def no_capture(self) -> AbstractContextManager[None]:
        """Forward and backward passes inside this context do not count (gradient penalties).

        Returns:
            A context manager; it nests.
        """
        return self._gate.pause()

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned, which are not, and why.

        Returns:
            One row per parameter with rank, memory and cost; prints as a table.
        """
        searching = self._gate.search is not None
        return report(self._model, self._selection, self._batches, searching, self.param_groups)

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, for any logger. Synchronises the device; free when not called.

        Per preconditioned layer, as ``layer/figure``: ``cosine`` between raw and preconditioned
        gradient; ``norm_ratio``, the length after over before preconditioning, without rescaling;
        each side's figures (for windows ``left_lambda``, ``left_effective_rank``, ...). Counted from
        construction on: ``refused_updates``, updates dropped because a batch was not finite, and
        ``raw_gradients``, preconditioned gradients that were not finite and gave way to the raw
        ones. Totals are under ``mkor/``.

        Returns:
            Names and numbers.
        """
        figures: dict[str, float] = {}
        totals = torch.zeros(2, dtype=torch.int64)
        cosines: list[float] = []
        for batch in self._batches:
            totals += batch.refused.sum(1).cpu()
            for name, numbers in batch.figures().items():
                figures.update({f"{name}/{key}": value for key, value in numbers.items()})
                cosines.append(numbers["cosine"])
        figures["mkor/layers"] = float(len(cosines))
        figures["mkor/steps"] = float(self._steps)
        figures["mkor/updates"] = float(self._updates)
        figures["mkor/mean_cosine"] = sum(cosines) / len(cosines) if cosines else 1.0
        figures["mkor/refused_updates"] = float(totals[0])
        figures["mkor/raw_gradients"] = float(totals[1])
        figures["mkor/skipped_steps"] = float(self._skipped_steps)
        return figures

    # ------------------------------------------------------------------------------------ phases

    def _precondition(self) -> None:
        if self._gate.search is not None:
            self._decide_outputs(self._gate.search)
        due = self._steps % self.update_every == 0
        if due:
            self._check_captures()
            with span("mkor.reduce"):
                self._communicator.sum(self._buffers)
        with span("mkor.update"):
            self._update(due)
        with span("mkor.precondition"):
            for batch in self._batches:
                batch.precondition(due, self.rescale)
        self._steps += 1
        self._updates += due
        self._passes = max(1, self._gate.passes.most)
        self._drop_captures()
        self._prepare_next()
        self._publish()

    def _update(self, due: bool) -> None:
        bad = [batch.measure() for batch in self._batches]
        if not (due and bad):
            return
        refuse = torch.stack([flag.to(bad[0].device) for flag in bad]).any()
        scale = 1.0 / (self.loss_scale * self._communicator.world_size)
        for batch in self._batches:
            batch.update(refuse.to(batch.shape.device), scale)

    def _check_captures(self) -> None:
        """Notice hooks that never run, without asking the device in every step."""
        if self._gate.calls or not self._gate.passes.most or self._silent < 0:
            return
        self._silent += 1
        if self._silent < _PATIENCE:
            return
        if any(bool(batch.meta.any()) for batch in self._batches):
            self._silent = -1
            return
        raise RuntimeError(
            f"{_PATIENCE} steps had gradients but not one layer's hook ran: wrap the optimizer "
            "before the first call of a compiled model (or call torch.compiler.reset() and compile "
            "again), and do not remove the model's forward hooks"
        )

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in checkpoint.all_parameters(self.param_groups)]
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        return all(bool(norm.isfinite()) for norm in norms)

    def _prepare_next(self) -> None:
        gate = self._gate
        gate.update = self._updates
        if self.curvature.rows is not None:
            shares = self._passes * self._communicator.world_size
            gate.rows = max(1, self.curvature.rows // shares)
        for batch in self._batches:
            batch.tick.fill_(self._updates)
        gate.want(self._steps % self.update_every == 0)
        numbers = (checkpoint.VERSION, self._steps, self._updates, self._passes)
        self._counters.copy_(torch.tensor(numbers))

    def _drop_captures(self) -> None:
        self._gate.forget()
        for buffer in self._buffers:
            buffer.zero_()

    # ------------------------------------------------------------------------------ construction

    def _build(self) -> None:
        parameters = list(checkpoint.all_parameters(self.param_groups))
        self._selection = select(self._model, parameters, self._skip)
        chosen = [layer for layer in self._selection.layers if not layer.reason]
        self._batches, self._buffers = allocate(chosen, self.curvature, self._gate)
        self._entries = checkpoint.Entries(self._batches, parameters, self._counters)
        _claim(self, [m for layer in self._selection.layers for m in layer.modules])
        if not chosen:
            warnings.warn(
                "MKOR preconditions no layer of this model; print(optimizer.coverage()) says why",
                stacklevel=4,
            )
        elif self._skip_output:
            self._gate.search = OutputSearch()
            self._eager = EagerUntilFound()
        self._install()

    def _install(self) -> None:
        _release(self._handles)
        sites = {
            layer.name: site
            for batch in self._batches
            for layer, site, skipped in zip(batch.layers, batch.sites, batch.skipped, strict=True)
            if not skipped
        }
        for layer in self._selection.layers:
            site = sites.get(layer.name)
            if site is None and self._gate.search is None:
                continue
            for module in layer.modules:
                hook = ForwardHook(self._gate, layer.name, site)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if site is not None:
                counter = self._gate.passes.counter(layer.name, self._gate)
                self._handles.append(layer.weight.register_post_accumulate_grad_hook(counter))

    def _rebuild(self) -> None:
        before = self._entries
        self._entries.take(self.base.state)
        self._end_search()
        self._build()
        self._entries.copy_from(before.by_parameter, {})
        self._read_outputs()
        self._prepare_next()
        if self._published:
            self._publish()

    # ------------------------------------------------------------------------- the output layers

    def _decide_outputs(self, search: OutputSearch) -> None:
        names = [layer.name for layer in self._selection.layers]
        outputs = search.outputs()
        votes = torch.tensor(
            [[float(name in search.reached), float(name in outputs)] for name in names]
        )
        reached, output = self._communicator.sum_small(votes).unbind(1)
        if not bool(reached.any()):
            return
        decided = {
            name
            for name, r, o in zip(names, reached.tolist(), output.tolist(), strict=True)
            if r == o > 0
        }
        for batch in self._batches:
            flags = [int(layer.name in decided) for layer in batch.layers]
            batch.state["output"].copy_(torch.tensor(flags))
        self._read_outputs()

    def _read_outputs(self) -> None:
        """Act on the recorded decision, if there is one."""
        flags = [batch.state["output"].tolist() for batch in self._batches]
        if not self._batches or any(flag < 0 for group in flags for flag in group):
            return
        for batch, group in zip(self._batches, flags, strict=True):
            batch.skipped = [self._skip_output and bool(flag) for flag in group]
        if all(all(batch.skipped) for batch in self._batches):
            warnings.warn(
                "MKOR preconditions no layer of this model: all that it could are next to the loss; "
                "pass skip_output=False to include them",
                stacklevel=4,
            )
        self._end_search()
        self._install()

    def _end_search(self) -> None:
        self._gate.search = None
        if self._eager is not None:
            self._eager.release()
            self._eager = None

    # ------------------------------------------------------------------ entries in the base's state

    def _publish(self) -> None:
        self._published = True
        self._entries.put(self.base.state)

    @contextmanager
    def _own_entries_out(self) -> Iterator[None]:
        """Bases initialise a parameter's state when it is empty, so theirs must be all they see."""
        self._entries.take(self.base.state)
        try:
            yield
        finally:
            if self._published and not self._closed:
                self._entries.put(self.base.state)

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._model.named_parameters()}


def _claim(wrapper: Preconditioned, modules: list[nn.Module]) -> None:
    """Make a wrapper the only one of its modules."""
    for module in modules:
        reference = _wrappers.get(module)
        other = None if reference is None else reference()
        if other is not None and other is not wrapper and not other._closed:
            warnings.warn(
                f"a {type(other).__name__} already watches this model; it is closed and the new one "
                "takes over",
                stacklevel=5,
            )
            other.close()
        _wrappers[module] = weakref.ref(wrapper)


def _release(handles: list[Any], gate: Gate | None = None) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    if gate is not None:
        gate.want(False)
        gate.search = None
