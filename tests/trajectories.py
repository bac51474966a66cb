"""Trains small nets in every way the library offers, and compares two checkouts step by step.

``python tests/trajectories.py --out FILE`` writes all parameters after every step, by row.
``python tests/trajectories.py --against CHECKOUT`` does so with this checkout and with another, and
prints by row how far apart any parameter ever was: the largest difference over the parameter's
largest entry. It fails where that exceeds the row's tolerance, or where a row raises.

Only the public API is used and nothing else of the tests, so that it runs whatever lies inside.
``--shake`` shows what a tolerance can mean: this checkout against itself, where all weights begin
off by some units in the last place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import mkor

STEPS = 12
ROWS_IN_BATCH = 12
F32, F64 = torch.float32, torch.float64
HALVES = (torch.float16, torch.bfloat16)

# What two ways of rounding may come to in 12 steps, where not all is computed in float64: about ten
# times of what --shake shows.
IN_SINGLE = 3e-4
IN_HALF = 5e-3
WEIGHTS_IN_HALF = 1e-1


# ------------------------------------------------------------------------------------ the nets


class Net(nn.Module):
    """What nets have in common: the shape of an input, and three classes to tell apart."""

    shape: tuple[int, ...] = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *self.shape, generator=generator, dtype=F64)


class Mixed(Net):
    """A convolution, layers of equal and of different shapes, and one that is used twice."""

    shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.first = nn.Linear(48, 8)
        self.norm = nn.LayerNorm(8)
        self.again = nn.Linear(8, 8, bias=False)
        self.equal = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.conv(x).tanh().flatten(1)))
        x = self.again(self.again(x).tanh()).tanh()
        for layer in self.equal:
            x = x + layer(x).tanh()
        return self.output(x)


class Shapes(Net):
    """Linear layers only, in turn with and without a bias, wide, narrow and of one output."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(5, 9), (9, 9), (9, 9), (9, 4), (4, 9), (9, 4), (4, 9), (9, 1), (1, 6), (6, 3)]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i % 3 != 1) for i, (a, b) in enumerate(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


class Tokens(Net):
    """Words with a layer over all of them, and an answer for each."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mix = nn.Linear(5, 5, bias=False)
        self.hidden = nn.Linear(6, 10)
        self.back = nn.Linear(10, 6)
        self.output = nn.Linear(6, 3)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(7, (n, *self.shape), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.output(x + self.back(self.hidden(x).tanh()))


class Tied(Tokens):
    """The answer is given with the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.embedding.weight


class Optional(Net):
    """One layer rests in every third step, another in all but each fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.often = nn.Linear(8, 8)
        self.seldom = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.turn % 3:
            x = x + self.often(x).tanh()
        if self.turn % 4 == 0:
            x = x + self.seldom(x).tanh()
        return self.output(x)


class Odd(Net):
    """Calls without a batch, of several shapes, by keyword, and of an image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.alone = nn.Linear(8, 8)
        self.several = nn.Linear(8, 8)
        self.image = nn.Conv1d(1, 2, 3, padding=1)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(input=x).tanh()
        x = x + self.alone(x[0]).tanh()
        x = x + self.several(x).tanh() + self.several(torch.stack((x, 2 * x))).tanh().mean(0)
        return self.output(x + self.image(x[:1]).tanh().mean(0))


class Silent(Net):
    """A layer that sees zeros only, one that is not listened to, and one with neither bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blind = nn.Linear(8, 8)
        self.blinder = nn.Linear(8, 8, bias=False)
        self.mute = nn.Linear(8, 8)
        self.later = nn.Linear(8, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = x + self.blind(0 * x).tanh() + self.blinder(0 * x) + 0 * self.mute(x)
        # Nothing is seen nor said in the first steps.
        return self.output(x + float(self.turn > 4) * self.later(x).tanh())


class Checkpointed(Mixed):
    """Forgets what is inside, and computes it again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Convolutions(Net):
    """Convolutions of one kind, a layer over what they see, and the mean over all places."""

    def __init__(self, kind: type[nn.Module], shape: tuple[int, ...], *layers: dict) -> None:
        super().__init__()
        self.shape = shape
        self.convolutions = nn.ModuleList(kind(**how) for how in layers)
        self.hidden = nn.Linear(layers[-1]["out_channels"], 6)
        self.output = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convolutions:
            x = layer(x).tanh()
        x = self.hidden(x.flatten(2).transpose(1, 2)).tanh()
        return self.output(x.mean(1))


def conv(inputs: int, outputs: int, size: int | tuple[int, ...] = 3, **how: Any) -> dict[str, Any]:
    return {"in_channels": inputs, "out_channels": outputs, "kernel_size": size} | how


class Attention(Net):
    """Attention to its own inputs, or to something else of other widths."""

    shape = (4, 5)

    def __init__(self, other: tuple[int, int] | None = None, first: bool = True, **how) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.other = None if other is None else nn.ModuleList(nn.Linear(5, d) for d in other)
        widths = {} if other is None else {"kdim": other[0], "vdim": other[1]}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=first, **widths, **how)
        self.batch_first = first
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        query = self.first(x).tanh()
        others = (query, query) if self.other is None else [f(x.flip(1)).tanh() for f in self.other]
        y = query + self.attention(query, *others, need_weights=False)[0].tanh()
        return self.output(y if self.batch_first else y.transpose(0, 1))


def conv1d(*layers: dict) -> Callable[[], Net]:
    return lambda: Convolutions(nn.Conv1d, (2, 11), *layers)


def conv2d(*layers: dict, shape: tuple[int, ...] = (2, 7, 6)) -> Callable[[], Net]:
    return lambda: Convolutions(nn.Conv2d, shape, *layers)


NETS: dict[str, Callable[[], Net]] = {
    "shapes": Shapes,
    "tokens": Tokens,
    "tied": Tied,
    "odd": Odd,
    "silent": Silent,
    "checkpointed": Checkpointed,
    "conv1d": conv1d(conv(2, 4), conv(4, 4, bias=False)),
    "conv1d[stride]": conv1d(conv(2, 4, 3, stride=2, padding=1), conv(4, 5, 2, padding=1)),
    "conv1d[dilation]": conv1d(conv(2, 4, 3, dilation=2, padding=3), conv(4, 4, 3, dilation=3)),
    "conv1d[same]": conv1d(conv(2, 4, 4, padding="same"), conv(4, 4, 3, padding="same")),
    "conv1d[circular]": conv1d(conv(2, 4, padding=2, padding_mode="circular"), conv(4, 4, 1)),
    "conv1d[reflect]": conv1d(conv(2, 4, 5, padding=2, stride=2, padding_mode="reflect")),
    "conv2d": conv2d(conv(2, 4), conv(4, 4, bias=False)),
    "conv2d[stride]": conv2d(conv(2, 4, 3, stride=2, padding=1), conv(4, 4, 2, stride=(2, 1))),
    "conv2d[dilation]": conv2d(conv(2, 4, (3, 2), dilation=(1, 2), padding=(2, 1)), conv(4, 5)),
    "conv2d[same]": conv2d(conv(2, 4, (4, 3), padding="same"), conv(4, 3, 3, padding="same")),
    "conv2d[circular]": conv2d(conv(2, 4, padding=(1, 2), padding_mode="circular"), conv(4, 4, 1)),
    "conv2d[reflect]": conv2d(conv(2, 4, padding=2, padding_mode="reflect", stride=2)),
    "conv2d[replicate]": conv2d(conv(2, 4, padding=1, padding_mode="replicate"), conv(4, 4, 2)),
    "conv2d[groups]": conv2d(conv(2, 4, groups=2), conv(4, 4)),
    "conv2d[whole]": conv2d(conv(2, 4, (7, 6))),
    "conv2d[large]": conv2d(conv(2, 3, padding=1), conv(3, 4, stride=2), shape=(2, 18, 15)),
    "conv3d": lambda: Convolutions(
        nn.Conv3d, (1, 4, 5, 6), conv(1, 3, (2, 3, 3), padding=(0, 1, 1), stride=(1, 2, 1))
    ),
    "attention": Attention,
    "attention[no bias]": lambda: Attention(bias=False),
    "attention[other]": lambda: Attention(other=(6, 7)),
    "attention[time first]": lambda: Attention(first=False),
}


def initialise(model: nn.Module, seed: int) -> None:
    """Weights of unit gain, small biases, and scales of about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.randn(p.shape, generator=generator, dtype=F64)
            if p.dim() > 1:
                p.copy_(value / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * value + ("norm.weight" in name))


# ----------------------------------------------------------------------------------- the bases


def adamw(parameters: Iterable[Tensor], **how: Any) -> Optimizer:
    """Its ``eps`` is large, so that gradients that are 0 but for rounding do not become steps."""
    return torch.optim.AdamW(parameters, lr=0.02, eps=1e-6, **how)


def muon_and_adamw(parameters: Iterable[Tensor]) -> Optimizer:
    """Torch's Muon takes matrices only."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    return mkor.Combined(torch.optim.Muon(matrices, lr=0.02), adamw(rest))


BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": adamw,
    "adamw-foreach": lambda p: adamw(p, foreach=True),
    "adamw-fused": lambda p: adamw(p, fused=True),
    "adamw-amsgrad": lambda p: adamw(p, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "muon": muon_and_adamw,
}


# ------------------------------------------------------------------------------------- a row


def plain(run: Run, i: int) -> None:
    """Ordinary training."""
    run.optimizer.zero_grad()
    run.backward(i)
    run.optimizer.step()


@dataclass(frozen=True)
class Row:
    """What is trained, by what, and how a step goes."""

    wrap: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "adamw"
    net: Callable[[], Net] = Mixed
    way: Callable[[Run, int], None] = plain
    dtype: torch.dtype = F64
    tolerance: float | None = None
    """None for what is asked for; else how far apart rounding may bring this row."""

    def with_options(self, **options: Any) -> Row:
        return replace(self, options=self.options | options)


class Run:
    """One row in training.

    Args:
        row: What is trained.
        shake: By how much weights are off at the beginning, relative to their size.
    """

    def __init__(self, row: Row, shake: float = 0.0) -> None:
        self.row = row
        self.memory: dict[str, Any] = {}
        self.build(seed=7)
        if shake:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for p in self.model.parameters():
                    noise = torch.randn(p.shape, generator=generator, dtype=F64).to(p)
                    p.mul_(1 + max(shake, torch.finfo(p.dtype).eps / 2) * noise)

    def build(self, seed: int) -> None:
        self.model = self.row.net().to(self.row.dtype)
        initialise(self.model, seed)
        base = BASES[self.row.base](self.model.parameters())
        self.optimizer = self.row.wrap(self.model, base, **self.row.options)

    def batch(self, i: int, n: int = ROWS_IN_BATCH) -> Tensor:
        x = self.model.draw(n, torch.Generator().manual_seed(1000 + i))
        return x.to(self.row.dtype) if x.is_floating_point() else x

    def loss(self, i: int, n: int = ROWS_IN_BATCH, x: Tensor | None = None) -> Tensor:
        outputs = self.model(self.batch(i, n) if x is None else x)
        generator = torch.Generator().manual_seed(2000 + i)
        labels = torch.randint(3, outputs.shape[:-1], generator=generator)
        return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())

    def backward(self, i: int, n: int = ROWS_IN_BATCH, share: float = 1.0) -> Tensor:
        loss = self.loss(i, n)
        (share * loss).backward()
        return loss.detach()


# ----------------------------------------------------------------------------- ways of a step


def accumulating(run: Run, i: int) -> None:
    """Two passes a step."""
    run.optimizer.zero_grad()
    for j in range(2):
        run.backward(100 * j + i, 6, 0.5)
    run.optimizer.step()


def accumulating_unevenly(run: Run, i: int) -> None:
    """One to three passes a step, each of another size."""
    run.optimizer.zero_grad()
    passes = (1, 3, 2, 2)[i % 4]
    for j in range(passes):
        run.backward(100 * j + i, 3 + 2 * j, 1 / passes)
    run.optimizer.step()


def zeroing(run: Run, i: int) -> None:
    """Gradients of layers that rest are 0 and not None."""
    run.optimizer.zero_grad(set_to_none=False)
    run.backward(i)
    run.optimizer.step()


def of_all_sizes(run: Run, i: int) -> None:
    """Batches from a single row to three times the usual number."""
    run.optimizer.zero_grad()
    run.backward(i, (12, 5, 1, 36, 12, 2)[i % 6])
    run.optimizer.step()


def nan_in_a_batch(run: Run, i: int) -> None:
    """One entry of one batch."""
    if i != 5:
        return plain(run, i)
    run.optimizer.zero_grad()
    x = run.batch(i)
    x[3].view(-1)[2] = float("nan")
    run.loss(i, x=x).backward()
    return run.optimizer.step()


def infinite_loss(run: Run, i: int) -> None:
    run.optimizer.zero_grad()
    run.backward(i, share=float("inf") if i in (0, 5) else 1.0)
    run.optimizer.step()


def nan_in_a_micro_batch(run: Run, i: int) -> None:
    run.optimizer.zero_grad()
    for j in range(2):
        run.backward(100 * j + i, 6, float("nan") if (i, j) == (5, 0) else 0.5)
    run.optimizer.step()


def nan_undone(run: Run, i: int) -> None:
    """The base does step; weights are put back, and the factors must not have noticed."""
    if i != 5:
        return plain(run, i)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    nan_in_a_batch(run, i)
    run.model.load_state_dict(before)
    return None


def nan_after_the_norm(run: Run, i: int) -> None:
    """Layers behind the normalisation see a good gradient, those before it do not."""
    handle = None
    if i == 5:
        handle = run.model.norm.register_forward_hook(
            lambda _module, _inputs, out: out.register_hook(lambda g: g * float("nan")) and None
        )
    plain(run, i)
    if handle is not None:
        handle.remove()


def forgetting(run: Run, i: int) -> None:
    """A pass whose gradients are thrown away, and one without gradients."""
    run.backward(300 + i, 7)
    run.optimizer.zero_grad()
    with torch.no_grad():
        run.loss(400 + i)
    run.loss(500 + i)  # never brought back
    run.backward(i)
    run.optimizer.step()


def uncounted(run: Run, i: int) -> None:
    """A second pass adds to the gradients and not to the statistics."""
    run.optimizer.zero_grad()
    run.backward(i)
    with run.optimizer.no_capture():
        run.backward(300 + i, 5, 0.3)
    run.optimizer.step()


def in_one_pass(run: Run, i: int) -> None:
    """Two forward passes before one backward pass."""
    run.optimizer.zero_grad()
    (run.loss(i, 7) + run.loss(300 + i, 6)).backward()
    run.optimizer.step()


def resuming(run: Run, i: int) -> None:
    """Halfway all is built anew and loaded."""
    if i == STEPS // 2:
        model, state = run.model.state_dict(), run.optimizer.state_dict()
        run.build(seed=8)
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(state)
    plain(run, i)


def going_back(run: Run, i: int) -> None:
    """After seven steps it goes on from the third."""
    if i == 3:
        model = {name: value.clone() for name, value in run.model.state_dict().items()}
        state = run.optimizer.state_dict()
        copies = {
            key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
            for key, entry in state["state"].items()
        }
        run.memory["saved"] = model, state | {"state": copies}
    if i == 7:
        run.model.load_state_dict(run.memory["saved"][0])
        run.optimizer.load_state_dict(run.memory["saved"][1])
    plain(run, i)


def scheduled(run: Run, i: int) -> None:
    if i == 0:
        run.memory["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
            run.optimizer, 0.05, total_steps=STEPS + 1, cycle_momentum=False
        )
    plain(run, i)
    run.memory["scheduler"].step()


def clipped(run: Run, i: int) -> None:
    run.optimizer.zero_grad()
    run.backward(i)
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.3)
    run.optimizer.step()


def scaled(run: Run, i: int) -> None:
    """As by a gradient scaler, whose scale grows."""
    scale = 256.0 if i < 6 else 512.0
    run.optimizer.zero_grad()
    run.backward(i, share=scale)
    for p in run.model.parameters():
        p.grad.div_(scale)
    run.optimizer.loss_scale = scale
    run.optimizer.step()


def freezing(run: Run, i: int) -> None:
    """A layer, and only the weight of another, stay as they are for a while."""
    run.model.first.requires_grad_(not 3 <= i < 6)
    run.model.equal[0].weight.requires_grad_(not 5 <= i < 9)
    plain(run, i)


def growing(run: Run, i: int) -> None:
    """The base knows some layers only from the fourth step on."""
    late = [*run.model.first.parameters(), *run.model.equal.parameters()]
    if i == 0:
        early = [p for p in run.model.parameters() if all(p is not q for q in late)]
        base = adamw(early)
        run.optimizer.close()
        run.optimizer = run.row.wrap(run.model, base, **run.row.options)
    if i == 4:
        run.optimizer.add_param_group({"params": late, "lr": 0.01})
    plain(run, i)


def closing(run: Run, i: int) -> None:
    if i == 7:
        run.optimizer.close()
    plain(run, i)


def beginning_empty(run: Run, i: int) -> None:
    """A first step without gradients, and one such step later."""
    if i in (0, 6):
        run.optimizer.zero_grad()
        return run.optimizer.step()
    return plain(run, i)


def watching(run: Run, i: int) -> None:
    """Somebody asks for the figures."""
    plain(run, i)
    run.optimizer.diagnostics()
    run.optimizer.state_dict()


def by_closure(run: Run, i: int) -> None:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        return run.backward(i)

    run.optimizer.step(closure)


def switching_by_closure(run: Run, i: int) -> None:
    by_closure(run, i)
    expect_a_switch(run, i)


def switching(run: Run, i: int) -> None:
    run.optimizer.zero_grad()
    run.optimizer.report_loss(run.backward(i))
    run.optimizer.step()
    expect_a_switch(run, i)


def resuming_after_a_switch(run: Run, i: int) -> None:
    if i == 10:
        resuming(run, STEPS // 2)
    else:
        switching(run, i)


def expect_a_switch(run: Run, i: int) -> None:
    if i == STEPS - 1 and not 3 < run.optimizer.switched_at < STEPS - 1:
        raise RuntimeError(f"this row shows nothing: switched at {run.optimizer.switched_at}")


def under_autocast(run: Run, i: int) -> None:
    run.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.loss(i)
    loss.backward()
    run.optimizer.step()


# ------------------------------------------------------------------------------------ the rows

SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.4, patience=0.0, warmup=2, every=2)
WINDOW = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9, "damping": 0.05}
DENSE = {"rule": "exact", "vectors": 2, "momentum": 0.9, "update_every": 1, "rescale": "running"}
KFAC = {"momentum": 0.9, "damping": 0.3}
EVA = {"momentum": 0.9, "damping": 0.3}
KINDS = {
    "mkor": Row(mkor.MKOR, WINDOW),
    "dense": Row(mkor.DenseMKOR, DENSE),
    "kfac": Row(mkor.KFAC, KFAC),
    "eva": Row(mkor.Eva, EVA),
}

SIDES = ("both", "left", "right")
LENGTHS = {
    "running": {"rescale": "running", "kl_clip": None},
    "step": {"rescale": "step", "kl_clip": None},
    "as it is": {"rescale": None, "kl_clip": None},
    "kl_clip": {"rescale": None, "kl_clip": 1e-3},
}
MEANS = {
    "one mean": {"vectors": 1, "rows": None},
    "all rows": {"vectors": 3, "rows": None},
    "few rows": {"vectors": 2, "rows": 2},
    "more rows": {"vectors": 4, "rows": 64},
}
INVERSIONS = {
    "every 1": {},
    "invert 3": {"inverse_every": 3},
    "every 2, invert 4": {"update_every": 2, "inverse_every": 4},
}
IN_TURN = ("sgd-momentum", "adamw", "muon")


def products() -> dict[str, Row]:
    """All options of each kind with each other; bases, and the output layer, in turn."""
    rows: dict[str, Row] = {}

    def add(kind: str, names: Iterable[str], options: dict[str, Any]) -> None:
        i = len(rows)
        base, skip_output = IN_TURN[i % 3], i // 3 % 2 == 0
        names = [*names, *(() if skip_output else ("output",))]
        row = KINDS[kind].with_options(**options, skip_output=skip_output)
        rows[f"{kind}[{', '.join(names)}]+{base}"] = replace(row, base=base)

    for i, (sides, length, every, means) in enumerate(product(SIDES, LENGTHS, (1, 3), MEANS)):
        rank = (6, 17)[i // 5 % 2]
        options = {"sides": sides, "update_every": every, "rank": rank}
        names = (sides, length, f"every {every}", means, f"rank {rank}")
        add("mkor", names, LENGTHS[length] | MEANS[means] | options)
    rules = ("exact", "paper", "release")
    for i, (rule, sides, length, every) in enumerate(product(rules, SIDES, LENGTHS, (1, 3))):
        means = list(MEANS)[i // 2 % 4]
        options = {"rule": rule, "sides": sides, "update_every": every}
        if i % 5 == 0:
            options["epsilon"] = 1.05
        names = (rule, sides, length, f"every {every}", means)
        add("dense", names, LENGTHS[length] | MEANS[means] | options)
    for sides, length, turns, pi in product(SIDES, LENGTHS, INVERSIONS, (False, True)):
        if pi and sides != "both":
            continue  # there is nothing to share then
        options = {"sides": sides, "pi_correction": pi} | INVERSIONS[turns]
        names = (sides, length, turns, *(("pi",) if pi else ()))
        add("kfac", names, LENGTHS[length] | options)
    for length, every, momentum in product(LENGTHS, (1, 3), (0.5, 0.95)):
        names = (length, f"every {every}", f"momentum {momentum}")
        add("eva", names, LENGTHS[length] | {"update_every": every, "momentum": momentum})
    return rows


def contract() -> dict[str, Row]:
    """Bases, defaults, and the wrapper itself around each kind of factor."""
    rows = {f"mkor+{base}": replace(KINDS["mkor"], base=base) for base in BASES}
    for name, wrap in {
        "MKOR": mkor.MKOR,
        "DenseMKOR": mkor.DenseMKOR,
        "KFAC": mkor.KFAC,
        "Eva": mkor.Eva,
    }.items():
        rows[f"{name} by default"] = Row(wrap)
    curvatures = {
        "Window": mkor.Window(rank=6, vectors=2, rows=4),
        "DenseInverse": mkor.DenseInverse(momentum=0.9),
        "Covariance": mkor.Covariance(damping=0.3),
        "RankOne": mkor.RankOne(damping=0.3),
    }
    for name, curvature in curvatures.items():
        rows[f"Preconditioned by {name}"] = Row(mkor.Preconditioned, {"curvature": curvature})
    return rows


def nets() -> dict[str, Row]:
    return {
        f"{name}: {kind}{'' if skip_output else ', output'}": replace(
            row.with_options(skip_output=skip_output), net=net
        )
        for name, net in NETS.items()
        for kind, row in (KINDS | {"mkor, all rows": all_rows()}).items()
        for skip_output in ((True, False) if name in ("shapes", "attention") else (False,))
    }


def all_rows() -> Row:
    return KINDS["mkor"].with_options(**MEANS["all rows"])


WAYS: dict[str, tuple[Callable[[Run, int], None], dict[str, Any]]] = {
    "two passes": (accumulating, {}),
    "one to three passes": (accumulating_unevenly, {}),
    "batches of all sizes": (of_all_sizes, {}),
    "NaN in a batch": (nan_in_a_batch, {"nonfinite": "skip"}),
    "infinite loss": (infinite_loss, {"nonfinite": "skip"}),
    "NaN in a micro-batch": (nan_in_a_micro_batch, {"nonfinite": "skip"}),
    "NaN after the norm": (nan_after_the_norm, {"nonfinite": "skip"}),
    "forgetting": (forgetting, {}),
    "no capture": (uncounted, {}),
    "two forward passes": (in_one_pass, {}),
    "resuming": (resuming, {}),
    "resuming between updates": (resuming, {"update_every": 4}),
    "going back": (going_back, {}),
    "scheduled": (scheduled, {}),
    "clipped": (clipped, {}),
    "loss scale": (scaled, {}),
    "freezing": (freezing, {}),
    "growing": (growing, {}),
    "closing": (closing, {}),
    "empty steps": (beginning_empty, {}),
    "watching": (watching, {}),
    "closure": (by_closure, {}),
    "skipping": (plain, {"skip": ("equal.*", nn.Conv2d)}),
    "hybrid by closure": (switching_by_closure, {"hybrid": SWITCH}),
    "hybrid by report": (switching, {"hybrid": SWITCH}),
    "hybrid resuming": (resuming_after_a_switch, {"hybrid": SWITCH}),
}


def ways() -> dict[str, Row]:
    rows = {
        f"{name}: {kind}": replace(row.with_options(**options), way=way)
        for name, (way, options) in WAYS.items()
        for kind, row in KINDS.items()
    }
    for kind, row in (KINDS | {"mkor, all rows": all_rows()}).items():
        # Put back weights are all there is to put back.
        rows[f"NaN undone: {kind}"] = replace(row, way=nan_undone, base="sgd")
        rows[f"unused: {kind}"] = replace(row, net=Optional)
        rows[f"unused, zero gradients: {kind}"] = replace(row, net=Optional, way=zeroing)
    for name, way in {"two passes": accumulating, "all sizes": of_all_sizes}.items():
        rows[f"{name}, conv2d[large]: mkor"] = replace(
            KINDS["mkor"], net=NETS["conv2d[large]"], way=way
        )
        rows[f"{name}, attention: mkor"] = replace(KINDS["mkor"], net=Attention, way=way)
    return rows


def precisions() -> dict[str, Row]:
    """Factors narrower than the weights, and weights of less than float64."""
    rows: dict[str, Row] = {}
    stored = {
        "mkor": KINDS["mkor"],
        "mkor, all rows": all_rows(),
        "dense": KINDS["dense"],
        "dense[paper]": KINDS["dense"].with_options(rule="paper"),
        "dense[release]": KINDS["dense"].with_options(rule="release"),
    }
    for (kind, row), dtype in product(stored.items(), (F32, *HALVES)):
        tolerance = IN_SINGLE if dtype == F32 else IN_HALF
        name = str(dtype).removeprefix("torch.")
        row = replace(row.with_options(factor_dtype=dtype), tolerance=tolerance)
        rows[f"{name} factors: {kind}"] = row
        rows[f"{name} factors, float32 weights: {kind}"] = replace(row, dtype=F32)
        if dtype != F32:
            rows[f"{name} factors, resuming: {kind}"] = replace(row, way=resuming)
    for kind, row in KINDS.items():
        single = replace(row, dtype=F32, tolerance=IN_SINGLE)
        half = replace(row, base="sgd", dtype=torch.bfloat16, tolerance=WEIGHTS_IN_HALF)
        rows[f"float32: {kind}"] = single
        rows[f"float32, two passes: {kind}"] = replace(single, way=accumulating)
        rows[f"float32, conv2d[stride]: {kind}"] = replace(single, net=NETS["conv2d[stride]"])
        rows[f"float32, attention: {kind}"] = replace(single, net=Attention, base="sgd-momentum")
        rows[f"bfloat16: {kind}"] = half
        rows[f"autocast: {kind}"] = replace(single, way=under_autocast, tolerance=IN_HALF)
    return rows


def all_of_them() -> dict[str, Row]:
    parts = [contract(), products(), nets(), ways(), precisions()]
    rows = {name: row for part in parts for name, row in part.items()}
    if len(rows) < sum(map(len, parts)):
        raise AssertionError("two rows have the same name")
    return rows


# --------------------------------------------------------------------------------- comparing

Trajectory = dict[str, Tensor]
"""A parameter's values after each step, by its name."""


def trajectory(row: Row, shake: float = 0.0) -> Trajectory:
    run = Run(row, shake)
    kept: dict[str, list[Tensor]] = {name: [] for name, _ in run.model.named_parameters()}
    for i in range(STEPS):
        run.model.turn = i
        row.way(run, i)
        for name, p in run.model.named_parameters():
            kept[name].append(p.detach().clone())
    return {name: torch.stack(values) for name, values in kept.items()}


def trajectories(pattern: str = "*", shake: float = 0.0) -> dict[str, Trajectory | str]:
    """Every row's trajectory, or the error it raised."""
    results: dict[str, Trajectory | str] = {}
    for name, row in all_of_them().items():
        if not fnmatchcase(name, pattern):
            continue
        try:
            results[name] = trajectory(row, shake)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            results[name] = f"{type(error).__name__}: {error} ({where})"
    return results


def difference(first: Trajectory, second: Trajectory) -> tuple[float, str]:
    """The largest relative difference, and where it is; NaN in the same place is none."""
    if first.keys() != second.keys():
        return float("inf"), "other parameters"
    worst, where = 0.0, ""
    for name, theirs in second.items():
        mine, theirs = first[name].to(F64), theirs.to(F64)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf"), f"{name}, step {i + 1}"
            a, b = a[a.isfinite()], b[b.isfinite()]
            if not b.numel() or torch.equal(a, b):
                continue
            apart = ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
            if apart > worst:
                worst, where = apart, f"{name}, step {i + 1}"
    return worst, where


def compared(
    first: dict[str, Trajectory | str], second: dict[str, Trajectory | str], tolerance: float
) -> bool:
    """Print every row; whether all of them agree."""
    rows = all_of_them()
    width = max(map(len, first))
    failed, largest = 0, {}
    for name, mine in first.items():
        theirs = second[name]
        own = rows[name].tolerance
        allowed = tolerance if own is None else max(own, tolerance)
        errors = [
            f"{which} raises {result}"
            for which, result in (("this", mine), ("the other", theirs))
            if isinstance(result, str)
        ]
        if isinstance(mine, str) or isinstance(theirs, str):
            failed += 1
            print(f"{name:{width}}  FAILED: {'; '.join(errors)}")
            continue
        apart, where = difference(mine, theirs)
        kind = "rows in float64" if own is None else f"rows with a tolerance of {own:.0e}"
        largest[kind] = max(largest.get(kind, 0.0), apart)
        verdict = "" if apart <= allowed else f"  FAILED: more than {allowed:.0e}"
        failed += bool(verdict)
        print(f"{name:{width}}  {apart:8.1e}{f'  {where}' if where else ''}{verdict}")
    figures = "; ".join(f"{kind}: at most {apart:.1e}" for kind, apart in largest.items())
    print(f"{len(first)} rows, {failed} failed. {figures}")
    return not failed


def checkout_of_this_file() -> Path:
    here = Path(__file__).resolve()
    return next(folder for folder in here.parents if (folder / "src" / "mkor").is_dir())


def trained_in(checkout: Path, pattern: str, shake: float = 0.0) -> dict[str, Trajectory | str]:
    """Run this script with another checkout's library, without kernels in C if it has some."""
    source = checkout.resolve() / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "MKOR_NATIVE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trajectories.pt"
        command = [sys.executable, __file__, "--out", str(file), "--rows", pattern]
        command += ["--shaken-by", str(shake), "--source", str(source)]
        subprocess.run(command, check=True, env=environment)
        return torch.load(file, weights_only=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--out", type=Path, help="write the trajectories of the imported mkor")
    asked.add_argument("--against", type=Path, help="a checkout to compare this one with")
    asked.add_argument("--shake", action="store_true", help="show what rounding comes to")
    asked.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="of rows in float64")
    parser.add_argument("--rows", default="*", help="a pattern of names")
    parser.add_argument("--shaken-by", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    how = parser.parse_args(arguments)
    if not any(fnmatchcase(name, how.rows) for name in all_of_them()):
        parser.error(f"no row is called {how.rows}")
    if how.list:
        print("\n".join(name for name in all_of_them() if fnmatchcase(name, how.rows)))
        return 0
    if how.out is None:
        here = checkout_of_this_file()
        first = trained_in(here, how.rows, 1e-15 if how.shake else 0.0)
        second = trained_in(here if how.shake else how.against, how.rows)
        return 0 if compared(first, second, how.tolerance) else 1
    imported = Path(mkor.__file__).resolve()
    if how.source is not None and not imported.is_relative_to(how.source):
        parser.error(f"{imported} was imported, which is not below {how.source}")
    torch.set_num_threads(1)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = trajectories(how.rows, how.shaken_by)
    torch.save(results, how.out)
    raised = sum(isinstance(result, str) for result in results.values())
    took = time.perf_counter() - began
    print(f"{len(results)} rows of {imported.parents[2]} in {took:.0f} s, {raised} raised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
