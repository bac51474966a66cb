"""Four tasks on the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import MissingExtraError
from .base import Batch, Task

PIXELS = 64
SIDE = 8
CLASSES = 10
BOTTLENECK = 8
HELD_OUT_SHARE = 5

MLP_SIZES = {"width": 128, "depth": 3, "batch": 64}
CONV_SIZES = {"width": 16, "depth": 3, "batch": 64}
LARGE_SIDE = 32
LARGE_SIZES = {"width": 8, "depth": 5, "batch": 64}
AUTOENCODER_SIZES = {"width": 128, "depth": 8, "batch": 128}


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1] as rows of 64 pixels, and their labels."""

    train: Batch
    held_out: Batch
    sha256: str


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """Loads the 1,797 images; every fifth of a fixed permutation is held out.

    Returns:
        The images and labels.

    Raises:
        MissingExtraError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "a digits task") from error
    pixels, labels = load(return_X_y=True)
    sha256 = hashlib.sha256(pixels.astype("uint8").tobytes() + labels.astype("uint8").tobytes())
    images = torch.tensor(pixels / 16.0, dtype=torch.float32)
    targets = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = len(order) // HELD_OUT_SHARE
    test, train = order[:cut], order[cut:]
    return Digits(
        (images[train], targets[train]), (images[test], targets[test]), sha256.hexdigest()
    )


def mlp(width: int, depth: int) -> nn.Module:
    """A classifier of fully connected layers.

    Args:
        width: Width of the hidden layers.
        depth: Number of linear layers.

    Returns:
        The model.
    """
    widths = [PIXELS, *[width] * (depth - 1)]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def conv_net(width: int, depth: int, side: int = SIDE) -> nn.Module:
    """A classifier of 3x3 convolutions; all but the first halve the image while it lasts.

    Args:
        width: Channels of the first convolution; each following has twice as many, at most 4x.
        depth: Number of convolutions.
        side: Of an image.

    Returns:
        The model.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    inputs = 1
    for index in range(depth):
        outputs = width * min(2**index, 4)
        stride = 2 if index and side > 2 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
        inputs, side = outputs, side // stride
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, CLASSES))


def autoencoder(width: int, depth: int) -> nn.Module:
    """A tanh autoencoder whose widths shrink to a bottleneck and grow again.

    Args:
        width: Width of the outermost hidden layers.
        depth: Number of linear layers, half of them on each side of the bottleneck.

    Returns:
        The model.
    """
    half = depth // 2
    ratio = (BOTTLENECK / width) ** (1 / max(1, half - 1))
    down = [PIXELS, *(round(width * ratio**index) for index in range(half - 1)), BOTTLENECK]
    widths = down + down[-2::-1]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of an image, summed over its pixels, mean over images.

    Args:
        output: `[batch, pixels]`.
        target: `[batch, pixels]`.

    Returns:
        The loss; predicting the mean image gives about 4.7.
    """
    return (output - target).square().sum(dim=1).mean()


def _random_rows(source: Batch, size: int, generator: torch.Generator) -> Batch:
    rows = torch.randperm(len(source[0]), generator=generator)[:size]
    return source[0][rows], source[1][rows]


def _about(digits: Digits) -> str:
    images = len(digits.train[0]) + len(digits.held_out[0])
    return f"scikit-learn's handwritten digits, {images:,} images of 8x8"


def digits_classes(
    sizes: Mapping[str, int], name: str, net: Callable[[int, int], nn.Module]
) -> Task:
    """A task of telling digits apart, `digits-mlp` or `digits-conv`.

    Args:
        sizes: Width, depth and batch.
        name: Of the task.
        net: Makes the model of a width and a depth.

    Returns:
        The task.
    """
    return _classes(sizes, name, net, load_digits())


def digits_large(sizes: Mapping[str, int]) -> Task:
    """The task `digits-large`: convolutions on the same images, enlarged.

    Args:
        sizes: Width, depth and batch.

    Returns:
        The task.
    """
    digits = load_digits()
    (train, labels), (held_out, answers) = digits.train, digits.held_out
    large = replace(
        digits, train=(_enlarged(train), labels), held_out=(_enlarged(held_out), answers)
    )
    task = _classes(sizes, "digits-large", partial(conv_net, side=LARGE_SIDE), large)
    return replace(task, steps=200, data=f"{task.data}, enlarged to {LARGE_SIDE}x{LARGE_SIDE}")


def _classes(
    sizes: Mapping[str, int], name: str, net: Callable[[int, int], nn.Module], digits: Digits
) -> Task:
    return Task(
        name=name,
        sizes=sizes,
        steps=300,
        data=_about(digits),
        sha256=digits.sha256,
        build=lambda: net(sizes["width"], sizes["depth"]),
        loss=functional.cross_entropy,
        draw=lambda generator: _random_rows(digits.train, sizes["batch"], generator),
        held_out=(digits.held_out,),
    )


def _enlarged(images: Tensor) -> Tensor:
    small = images.view(-1, 1, SIDE, SIDE)
    return functional.interpolate(small, size=(LARGE_SIDE,) * 2, mode="bilinear").flatten(1)


def digits_autoencoder(sizes: Mapping[str, int]) -> Task:
    """The task `digits-autoencoder`.

    Args:
        sizes: Width, depth and batch.

    Returns:
        The task.
    """
    digits = load_digits()
    train, held_out = ((images, images) for images, _ in (digits.train, digits.held_out))
    return Task(
        name="digits-autoencoder",
        sizes=sizes,
        steps=600,
        data=_about(digits),
        sha256=digits.sha256,
        build=lambda: autoencoder(sizes["width"], sizes["depth"]),
        loss=squared_error,
        draw=lambda generator: _random_rows(train, sizes["batch"], generator),
        held_out=(held_out,),
    )
