"""Rows taken from a running model by hooks of our own, and parameters as matrices."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from oracles import window as oracles
from oracles.dense import kl_scale

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Recorder:
    """Keeps every call of every layer, in the order in which the backward pass meets them."""

    def __init__(self, model: nn.Module):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, KINDS)}
        self.calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for name, module in self.layers.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name):
        def forward_hook(_module, inputs, output):
            x = inputs[0].detach().clone()
            if output.requires_grad:
                output.register_hook(lambda g: self.calls[name].append((x, g.detach().clone())))

        return forward_hook

    def take(self) -> dict[str, list[list[oracles.Call]]]:
        """Calls since the last time: for each layer, for each group, a list of calls."""
        taken = {}
        for name, calls in self.calls.items():
            layer = self.layers[name]
            if isinstance(layer, nn.Linear):
                taken[name] = [[oracles.linear_call(x, g) for x, g in calls]]
            else:
                by_call = [oracles.conv_calls(layer, x, g) for x, g in calls]
                taken[name] = [list(group) for group in zip(*by_call, strict=True)]
        self.calls.clear()
        return taken


def matrices(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None):
    """``M`` of each group: ``[groups, d_out, d_in (+ 1)]``, in float64."""
    groups = getattr(layer, "groups", 1)
    M = weight.detach().double().flatten(1)
    if bias is not None:
        M = torch.cat([M, bias.detach().double()[:, None]], dim=1)
    return M.reshape(groups, M.shape[0] // groups, M.shape[1])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each layer as matrices, as it stands in ``p.grad`` now."""
    return {
        name: matrices(m, m.weight.grad, None if m.bias is None else m.bias.grad).clone()
        for name, m in model.named_modules()
        if isinstance(m, KINDS) and m.weight.grad is not None
    }


class Twin:
    """The naive optimizer: layer by layer, from the whole history of recorded rows.

    ``how`` goes to ``kind``, one of the layers of the oracles. With ``kl_clip`` all preconditioned
    gradients are shortened together, for the learning rates ``lr``: one, or one by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: type[oracles.Layer] = oracles.TwinLayer,
        update_every: int = 1,
        rows: str | None = None,
        kl_clip: float | None = None,
        lr: float | dict[str, float] = 1.0,
        **how,
    ):
        self.recorder = Recorder(model)
        self.update_every, self.rows, self.steps = update_every, rows, 0
        self.kl_clip, self.lr = kl_clip, lr
        self.layers = {
            name: [
                kind(bias=layer.bias is not None, **how) for _ in range(getattr(layer, "groups", 1))
            ]
            for name, layer in self.recorder.layers.items()
        }

    def step(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Preconditions ``raw`` gradients with the rows recorded since the last step."""
        calls = self.recorder.take()
        number, between = divmod(self.steps, self.update_every)
        self.steps += 1
        if not between:
            for name, groups in calls.items():
                for twin, group in zip(self.layers[name], groups, strict=True):
                    twin.update(oracles.in_runs(group) if self.rows == "runs" else group, number)
            for twin in (twin for twins in self.layers.values() for twin in twins):
                if twin.updates:
                    twin.refresh(number)
        new = {
            name: self._precondition(name, M)
            for name, M in raw.items()
            # Not those without data in this step, and not those that have no factors yet.
            if (name in calls or between) and self.layers[name][0].ready
        }
        return raw | self._clipped(raw, new)

    def _precondition(self, name: str, M: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [twin.precondition(m) for twin, m in zip(self.layers[name], M, strict=True)]
        )

    def _clipped(self, raw, new):
        if self.kl_clip is None:
            return new
        lr = self.lr if isinstance(self.lr, dict) else dict.fromkeys(new, self.lr)
        nu = kl_scale([(lr[name], P, raw[name]) for name, P in new.items()], self.kl_clip)
        return {name: nu * P for name, P in new.items()}
