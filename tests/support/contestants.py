"""The rows of the contract: every optimizer that the promises are made for.

A later optimizer joins by one entry in ``ROWS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

import mkor
from support.toy import toy

PREFIX = "mkor_"
"""Names of the wrapper's own entries in ``optimizer.state`` begin with it."""


@dataclass(frozen=True)
class Row:
    """How to build a wrapper and the base below it.

    ``one_mean`` are the options with which an update learns one mean of all rows, or all rows.
    """

    wrap: Callable[..., torch.optim.Optimizer]
    base: Callable[[Any], torch.optim.Optimizer]
    defaults: dict[str, Any]
    one_mean: Mapping[str, Any] = field(default_factory=dict)

    def make(self, model: nn.Module, parameters=None, **options) -> Any:
        """The wrapper over a new base of the model's parameters."""
        return self.over(model, self.base(parameters or model.parameters()), **options)

    def over(self, model: nn.Module, base: torch.optim.Optimizer, **options) -> Any:
        return self.wrap(model, base, **(self.defaults | options))


def muon_and_adamw(parameters):
    """Torch's Muon takes matrices only; the rest goes to AdamW."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    return mkor.Combined(torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01))


def schedule_free(parameters):
    """It steps in its training mode only."""
    base = schedulefree.AdamWScheduleFree(parameters, lr=0.01, warmup_steps=3)
    base.train()
    return base


def eight_bit(parameters):
    """Moments of 8 bits each, also of the small weights here."""
    return bitsandbytes.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=16)


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": muon_and_adamw,
    "lamb": lambda p: pytorch_optimizer.Lamb(p, lr=0.01),
    "soap": lambda p: pytorch_optimizer.SOAP(p, lr=0.01),
    "schedule-free": schedule_free,
    "adamw-8bit": eight_bit,
}

WINDOW = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9, "damping": 0.05}
DENSE = {"vectors": 2, "momentum": 0.9, "update_every": 1}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.4, patience=0.0, warmup=2, every=2)
"""Hands over to the base after the sixth step of ``train`` from the beginning."""


def windows(base: str, **how) -> Row:
    return Row(mkor.MKOR, BASES[base], WINDOW | how, {"vectors": 1, "rows": None})


def dense(base: str, **how) -> Row:
    return Row(mkor.DenseMKOR, BASES[base], DENSE | how, {"vectors": 1})


def kfac(base: str, **how) -> Row:
    return Row(mkor.KFAC, BASES[base], {"momentum": 0.9, "damping": 0.01} | how)


def eva(base: str, **how) -> Row:
    return Row(mkor.Eva, BASES[base], {"momentum": 0.9} | how)


ROWS = {f"mkor+{name}": windows(name) for name in BASES} | {
    "mkor[left,step]+adamw": windows("adamw", sides="left", rescale="step", rows=None),
    "mkor[every 3]+sgd-momentum": windows("sgd-momentum", update_every=3, rescale=None),
    "mkor[bfloat16]+adamw": windows("adamw", factor_dtype=torch.bfloat16),
    "mkor-h+adamw": windows("adamw", hybrid=SWITCH),
    "dense[paper]+sgd": dense("sgd", rule="paper", vectors=1),
    "dense[exact]+adamw": dense("adamw", rule="exact", epsilon=1.05, rescale="running"),
    "dense[release,float16]+adamw": dense("adamw", rule="release", factor_dtype=torch.float16),
    "dense[every 3]+sgd-momentum": dense("sgd-momentum", update_every=3, sides="right"),
    "kfac+sgd-momentum": kfac("sgd-momentum"),
    "kfac[pi,running]+adamw": kfac(
        "adamw", pi_correction=True, inverse_every=2, kl_clip=None, rescale="running"
    ),
    "eva+adamw": eva("adamw"),
    "eva-h[step]+sgd": eva("sgd", kl_clip=None, rescale="step", hybrid=SWITCH),
    "toy+sgd-momentum": Row(toy, BASES["sgd-momentum"], {}),
}


WRITES = "it writes into the gradients as it steps"
RESTS = "its first step moves nothing"
EXCEPTIONS = {
    "mkor+muon": {
        "test_add_param_group": "Combined has no single place for a new group",
        "test_options_per_group": "its groups are made by Combined",
    },
    "mkor+schedule-free": {
        "test_clipping_sees_the_raw_gradient": WRITES,
        "test_rescaling_keeps_the_clipped_norm": WRITES,
        "test_frozen_weight_with_a_training_bias": WRITES,
        "test_base_with_parameters_from_elsewhere": WRITES,
        "test_closing_drops_captures": WRITES,
        "test_distributed_checkpoint[flatten]": (
            "alone it does not resume from a flattened checkpoint either"
        ),
    },
    "mkor+soap": {
        "test_accumulation_equals_the_whole_batch": "it blows rounding up to signs",
        "test_add_param_group": RESTS,
        "test_base_with_parameters_from_elsewhere": RESTS,
        "test_distributed_checkpoint[flatten]": ("it keeps lists, which torch cannot flatten"),
    },
}
"""Promises that a base makes impossible, and why, by row and test."""


class Net(nn.Module):
    """A convolution, a hidden layer used twice, a normalisation and an output layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1, dtype=dtype)
        self.first = nn.Linear(48, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.again = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.output = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        x = self.first(self.conv(x).relu().flatten(1))
        return self.output(self.again(self.again(self.norm(x)).tanh()).tanh())


def batch(i: int, n: int = 12, dtype=torch.float32):
    """The ``i``-th batch, always the same."""
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(1000 + i)
    x = torch.randn(n, 1, 4, 4, generator=generator, device="cpu")
    y = torch.randint(3, (n,), generator=generator, device="cpu")
    return x.to(device, dtype), y.to(device)


def backward(model: nn.Module, i: int, n: int = 12) -> torch.Tensor:
    x, y = batch(i, n, next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer, steps, start: int = 0) -> list[float]:
    """Ordinary training on the batches from ``start``."""
    losses = []
    for i in range(start, start + steps):
        optimizer.zero_grad()
        loss = backward(model, i)
        losses.append(loss.item())
        report(optimizer, loss)
        optimizer.step()
    return losses


def report(optimizer, loss: torch.Tensor) -> None:
    """Tell a hybrid of the loss; other wrappers refuse to hear of it."""
    if isinstance(optimizer, mkor.Preconditioned):
        with suppress(RuntimeError):
            optimizer.report_loss(loss)


def seeded(make=Net, seed: int = 0, **how) -> nn.Module:
    torch.manual_seed(seed)
    return make(**how)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def entries(optimizer) -> list[dict[str, Any]]:
    """What ``optimizer.state`` holds of each parameter, in the order of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p] for p in parameters if p in optimizer.state]


ADVANCING = {PREFIX + key for key in ("counters", "norms", "losses", "switch")}
"""Entries that change in every step, whatever the batch is."""


def factors(optimizer) -> list[torch.Tensor]:
    """Copies of all factors, without what advances in every step."""
    return [
        value.clone()
        for entry in entries(optimizer)
        for key, value in sorted(entry.items())
        if key.startswith(PREFIX) and key not in ADVANCING
    ]


def base_state(optimizer) -> list[torch.Tensor]:
    return [
        torch.as_tensor(part).clone()
        for entry in entries(optimizer)
        for key, value in sorted(entry.items())
        if not key.startswith(PREFIX)
        for part in (value if isinstance(value, list) else [value])
    ]


def same_beside_nans(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Bitwise, NaN included."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and (torch.equal(a, b) or same_beside_nans(a, b))
        for a, b in zip(first, second, strict=True)
    )


def hooks(model: nn.Module) -> int:
    """How many hooks a model's modules and parameters carry."""
    modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    return modules + sum(
        len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ())
        for p in model.parameters()
    )
