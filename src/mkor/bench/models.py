"""The models that `mkor overhead` trains beside the tasks, and one training iteration of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.profiler import record_function

from .cli import UnknownNameError, UsageError
from .contestants import Contestant, build, has_switch
from .tasks import TASKS, Batch, Block, batches, load_task, new_model

SEED, OUTPUTS, CLASSES, HEAD = 0, 16, 10, 64
LEARNING_RATE = 1e-4  # Small, so that many steps on one batch do not end in infinities or zeros.
WARMUP, SWITCH_WITHIN = 5, 1000

Sizes = Mapping[str, int]
Marks = list[tuple[float, float]]


@dataclass(frozen=True)
class Subject:
    """What is trained: a model, always with the same weights, on one batch."""

    name: str
    sizes: dict[str, int]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Batch
    device: str = "cpu"
    autocast: torch.dtype | None = None

    def products(self) -> AbstractContextManager[object]:
        """The context of the forward pass: autocasting, or nothing."""
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)


class Worker:
    """A contestant that trains a model of its own; `marks` holds the clocks of timed iterations."""

    def __init__(self, contestant: Contestant, subject: Subject) -> None:
        """Makes model and optimizer."""
        self.contestant, self.subject, self.label = contestant, subject, contestant.label
        self.model = subject.build().to(subject.device)
        self.batch = [part.to(subject.device) for part in subject.batch]
        self.optimizer: Optimizer = build(contestant, self.model, LEARNING_RATE, 0.0)
        self.marks: list[Marks] = []

    def iterate(self, reported: float | None = None) -> Marks:
        """Trains one step; CPU and wall seconds around forward, backward and step (4 pairs)."""
        inputs, target = self.batch
        marks = [self._clocks(wait=True)]
        with record_function("forward"), self.subject.products():
            loss = self.subject.loss(self.model(inputs), target)
        marks.append(self._clocks())
        with record_function("backward"):
            torch.autograd.backward(loss)
        marks.append(self._clocks())
        with record_function("step"):
            if has_switch(self.contestant.wrapper):
                told = loss.detach() if reported is None else reported
                self.optimizer.report_loss(told)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [*marks, self._clocks(wait=True)]

    def _clocks(self, *, wait: bool = False) -> tuple[float, float]:
        """CPU and wall seconds, on a GPU after its work is done."""
        if wait and self.subject.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def warm_up(self) -> None:
        """Trains untimed steps; a contestant with a switch is brought past it."""
        for _ in range(WARMUP):
            self.iterate()
        if not has_switch(self.contestant.wrapper):
            return
        optimizer: Any = self.optimizer
        for step in range(SWITCH_WITHIN):
            # A loss that halves at every step soon no longer falls fast.
            self.iterate(reported=2.0**-step)
            if optimizer.switched_at is not None:
                return
        raise UsageError(f"{self.label} did not switch within {SWITCH_WITHIN} steps.")

    def layers(self) -> list[tuple[int, int]]:
        """`(d_out, d_in)` of each preconditioned weight matrix, a bias as one more input."""
        optimizer: Any = self.optimizer
        if self.contestant.wrapper is None:
            return []
        rows = {row.parameter: row.shape for row in optimizer.coverage() if row.preconditioned}
        matrices = {name: shape for name, shape in rows.items() if len(shape) > 1}
        return [
            (
                shape[0],
                torch.Size(shape[1:]).numel() + (f"{name.removesuffix('weight')}bias" in rows),
            )
            for name, shape in matrices.items()
        ]


def convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution that keeps the image's size but for its stride, and a normalization."""
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


class Residual(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck where `expansion` exceeds one."""

    def __init__(self, channels: int, inner: int, stride: int, expansion: int) -> None:
        """Makes the layers."""
        super().__init__()
        out = expansion * inner
        shapes = [(channels, inner, 3, stride), (inner, out, 3, 1)]
        if expansion > 1:
            shapes = [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
        first, *others = (convolution(*shape) for shape in shapes)
        self.body = nn.Sequential(first, *(m for each in others for m in (nn.ReLU(), each)))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else convolution(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return functional.relu(self.body(x) + self.shortcut(x))


def make_residual(
    first: nn.Module, width: int, blocks: tuple[int, ...], expansion: int
) -> nn.Module:
    """A residual net: each stage but the first has half the image's size and twice the width."""
    layers, channels = [first, nn.ReLU()], width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for index in range(count):
            layers.append(Residual(channels, inner, 2 if stage and not index else 1, expansion))
            channels = expansion * inner
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(*layers, *head)


def make_conv_net(sizes: Sizes) -> nn.Module:
    """The residual net of 32x32 images: three stages; ResNet-20 where width is 16 and depth 3."""
    width = sizes["width"]
    return make_residual(convolution(3, width, 3), width, (sizes["depth"],) * 3, expansion=1)


def make_resnet50(_: Sizes) -> nn.Module:
    """ResNet-50, but for its number of classes."""
    first = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return make_residual(first, 64, (3, 4, 6, 3), expansion=4)


def make_mlp(sizes: Sizes) -> nn.Module:
    """Square linear layers with GELU, and a narrow output layer."""
    width = sizes["width"]
    hidden = [m for _ in range(sizes["depth"]) for m in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))


def make_transformer(sizes: Sizes) -> nn.Module:
    """Blocks with heads of 64 as far as that goes, and a narrow output layer; no embeddings."""
    blocks = (Block(sizes["width"], HEAD, is_causal=False) for _ in range(sizes["depth"]))
    return nn.Sequential(*blocks, nn.Linear(sizes["width"], OUTPUTS))


def numbers(*shape: int) -> Batch:
    """Normal numbers `[*shape]` to be made of normal numbers `[*shape[:-1], OUTPUTS]`."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randn((*shape[:-1], OUTPUTS), generator=generator)


def images(count: int, size: int) -> Batch:
    """Noise `[count, 3, size, size]` in random classes."""
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.randn(count, 3, size, size, generator=generator)
    return pictures, torch.randint(CLASSES, (count,), generator=generator)


Loss = Callable[[Tensor, Tensor], Tensor]
Recipe = tuple[Sizes, Callable[[Sizes], nn.Module], Callable[[Sizes], Batch], Loss]


def _transformer(width: int, depth: int, batch: int, context: int) -> Recipe:
    """A recipe of transformer blocks."""
    sizes = {"width": width, "depth": depth, "batch": batch, "context": context}
    return sizes, make_transformer, _sequences, functional.mse_loss


def _sequences(sizes: Sizes) -> Batch:
    """Sequences of vectors `[batch, context, width]`."""
    return numbers(sizes["batch"], sizes["context"], sizes["width"])


MODELS: Mapping[str, Recipe] = {
    "mlp": (
        {"width": 512, "depth": 4, "rows": 4096},
        make_mlp,
        lambda sizes: numbers(sizes["rows"], sizes["width"]),
        functional.mse_loss,
    ),
    "transformer": _transformer(256, 4, 8, 256),
    "bert-base-block": _transformer(768, 1, 4, 512),
    # The matrices of BERT-base's encoder on few tokens, for counting what is sent.
    "bert-base-shapes": _transformer(768, 12, 4, 16),
    "conv-net": (
        {"width": 16, "depth": 3, "batch": 64},
        make_conv_net,
        lambda sizes: images(sizes["batch"], 32),
        functional.cross_entropy,
    ),
    "resnet50": (
        {"batch": 32},
        make_resnet50,
        lambda sizes: images(sizes["batch"], 224),
        functional.cross_entropy,
    ),
}


def model_subject(name: str, given: Sizes) -> Subject:
    """The subject of a model's name, with some of its sizes given."""
    defaults, make, batch, loss = MODELS[name]
    for key in given:
        if key not in defaults:
            known = ", ".join(f"--{size}" for size in defaults)
            raise UsageError(f"{name} has no --{key}; its sizes are {known}.")
    sizes = {**defaults, **given}

    def build_model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return make(sizes)

    return Subject(name, sizes, build_model, loss, batch(sizes))


def make_subject(arguments: argparse.Namespace) -> Subject:
    """What the command line asks to be trained."""
    name, keys = arguments.model, ("width", "depth", "batch", "context", "rows")
    given = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU.")
    if name in MODELS:
        subject = model_subject(name, given)
    elif name not in TASKS:
        raise UnknownNameError("model", name, [*MODELS, *TASKS])
    elif "rows" in given:
        raise UsageError(f"--rows is for mlp; {name} has --batch.")
    else:
        task = load_task(name, given)
        batch = next(batches(task, SEED))
        subject = Subject(name, dict(task.sizes), lambda: new_model(task, SEED), task.loss, batch)
    autocast = torch.bfloat16 if arguments.bf16 else None
    return replace(subject, device=arguments.device, autocast=autocast)
