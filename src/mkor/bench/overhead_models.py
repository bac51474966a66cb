"""What `mkor overhead` times beside the tasks: models of the usual shapes, on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import UsageError
from .tasks import Batch
from .worker import Subject

OUTPUTS = 16
CLASSES = 10
HEAD = 64
INNER = 4
IMAGE = 32
SEED = 0

Sizes = Mapping[str, int]


def make_mlp(width: int, depth: int) -> nn.Module:
    """Square linear layers with GELU, and a narrow output layer.

    Args:
        width: Width of the hidden layers.
        depth: Number of hidden layers.

    Returns:
        The model.
    """
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))


class Block(nn.Module):
    """A transformer block: attention with four projections, and a feed-forward part."""

    def __init__(self, width: int) -> None:
        """Makes the layers.

        Args:
            width: Of the model.
        """
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, INNER * width), nn.Linear(INNER * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Through the block.

        Args:
            x: `[batch, context, width]`.

        Returns:
            The same shape.
        """
        y = self.first(x)
        parts = (layer(y) for layer in (self.query, self.key, self.value))
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(*split)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        inner = functional.gelu(self.inner(self.second(x)))
        return x + torch.as_tensor(self.outer(inner))


def make_transformer(width: int, depth: int) -> nn.Module:
    """Blocks and a narrow output layer; no embeddings.

    Args:
        width: Width of the blocks, in heads of 64 as far as that goes.
        depth: Number of blocks.

    Returns:
        The model.
    """
    return nn.Sequential(*(Block(width) for _ in range(depth)), nn.Linear(width, OUTPUTS))


def convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution that keeps the image's size but for its stride, and a normalization.

    Args:
        channels: Channels that come in.
        out: Channels that go out.
        kernel: Side of the kernel.
        stride: Distance of neighbouring positions.

    Returns:
        Both.
    """
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


class Residual(nn.Module):
    """A residual block: two 3x3 convolutions, or one between two of 1x1."""

    def __init__(self, channels: int, inner: int, stride: int, expansion: int) -> None:
        """Makes the layers.

        Args:
            channels: Channels that come in.
            inner: Channels inside.
            stride: Of the first 3x3 convolution.
            expansion: How many times as many go out; more than one makes it a bottleneck.
        """
        super().__init__()
        out = expansion * inner
        if expansion > 1:
            shapes = [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
        else:
            shapes = [(channels, inner, 3, stride), (inner, out, 3, 1)]
        first, *others = (convolution(*shape) for shape in shapes)
        self.body = nn.Sequential(first, *(m for each in others for m in (nn.ReLU(), each)))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else convolution(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Through the block.

        Args:
            x: Images.

        Returns:
            Images.
        """
        return functional.relu(self.body(x) + self.shortcut(x))


def make_residual(
    first: nn.Module, width: int, blocks: tuple[int, ...], expansion: int
) -> nn.Module:
    """A residual net: stages of blocks, each but the first with half the size and twice as wide.

    Args:
        first: What comes before the blocks, with `width` channels.
        width: Inner channels of the first stage.
        blocks: Number of blocks in each stage.
        expansion: See `Residual`.

    Returns:
        The model.
    """
    layers, channels = [first, nn.ReLU()], width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            layers.append(Residual(channels, inner, stride, expansion))
            channels = expansion * inner
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )


def make_conv_net(width: int, depth: int) -> nn.Module:
    """The residual net of 32x32 images: three stages, 20 layers where the depth is 3.

    Args:
        width: Channels of the first stage.
        depth: Blocks of each stage.

    Returns:
        The model.
    """
    return make_residual(convolution(3, width, 3), width, (depth,) * 3, expansion=1)


def make_resnet50() -> nn.Module:
    """ResNet-50, but for its number of classes.

    Returns:
        The model.
    """
    first = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return make_residual(first, 64, (3, 4, 6, 3), expansion=4)


def numbers(shape: tuple[int, ...], targets: tuple[int, ...]) -> Batch:
    """Normal numbers to be made of normal numbers.

    Args:
        shape: Of the input.
        targets: Of the target.

    Returns:
        Both.
    """
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(shape, generator=generator), torch.randn(targets, generator=generator)


def images(count: int, size: int) -> Batch:
    """Noise in random classes.

    Args:
        count: Number of images.
        size: Their side.

    Returns:
        Images and classes.
    """
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.randn(count, 3, size, size, generator=generator)
    return pictures, torch.randint(CLASSES, (count,), generator=generator)


def sequences(sizes: Sizes) -> Batch:
    """Sequences of vectors.

    Args:
        sizes: Batch, context and width.

    Returns:
        Input and target.
    """
    shape = (sizes["batch"], sizes["context"])
    return numbers((*shape, sizes["width"]), (*shape, OUTPUTS))


@dataclass(frozen=True)
class Recipe:
    """How a subject is made.

    Attributes:
        sizes: Its sizes unless told otherwise.
        build: From sizes to the model.
        batch: From sizes to a batch.
        loss: From output and target to a mean loss.
    """

    sizes: Sizes
    build: Callable[[Sizes], nn.Module]
    batch: Callable[[Sizes], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss


def _transformer(width: int, depth: int, batch: int, context: int) -> Recipe:
    sizes = {"width": width, "depth": depth, "batch": batch, "context": context}
    return Recipe(sizes, lambda sizes: make_transformer(sizes["width"], sizes["depth"]), sequences)


MODELS: Mapping[str, Recipe] = {
    "mlp": Recipe(
        {"width": 512, "depth": 4, "rows": 4096},
        lambda sizes: make_mlp(sizes["width"], sizes["depth"]),
        lambda sizes: numbers((sizes["rows"], sizes["width"]), (sizes["rows"], OUTPUTS)),
    ),
    "transformer": _transformer(256, 4, 8, 256),
    "bert-base-block": _transformer(768, 1, 4, 512),
    "conv-net": Recipe(
        {"width": 16, "depth": 3, "batch": 64},
        lambda sizes: make_conv_net(sizes["width"], sizes["depth"]),
        lambda sizes: images(sizes["batch"], IMAGE),
        functional.cross_entropy,
    ),
    "resnet50": Recipe(
        {"batch": 32},
        lambda _: make_resnet50(),
        lambda sizes: images(sizes["batch"], 224),
        functional.cross_entropy,
    ),
}


def model_subject(name: str, given: Sizes) -> Subject:
    """A subject of the table.

    Args:
        name: One of `MODELS`.
        given: Sizes that differ from its own.

    Returns:
        The subject.

    Raises:
        UsageError: If it has no such size.
    """
    recipe = MODELS[name]
    for key in given:
        if key not in recipe.sizes:
            known = ", ".join(f"--{size}" for size in recipe.sizes)
            raise UsageError(f"{name} has no --{key}; its sizes are {known}.")
    sizes = {**recipe.sizes, **given}

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return recipe.build(sizes)

    return Subject(name, sizes, build, recipe.loss, recipe.batch(sizes))
