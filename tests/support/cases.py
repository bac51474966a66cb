"""Every kind of convolution that a model may hold."""

import itertools
import warnings

import torch
from torch import nn

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (7, 6, 5)
COMMON = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}

MODES = ("zeros", "reflect", "replicate", "circular")
PADDINGS = (0, 1, "same", "valid")
# Every mode meets every padding, and both meet images of one, two and three dimensions in turn.
IN_TURN = [
    ((m + p) % 3 + 1, mode, padding)
    for (m, mode), (p, padding) in itertools.product(enumerate(MODES), enumerate(PADDINGS))
]

CONVOLUTIONS = {
    f"conv{dims}d-{mode}-{padding}": (dims, {"padding": padding, "padding_mode": mode})
    for dims, mode, padding in [
        *IN_TURN,
        *((dims, "zeros", 1) for dims in KINDS),
        (2, "reflect", "same"),
    ]
} | {
    "conv1d-stride-dilation": (1, {"stride": 2, "dilation": 2, "padding": 3}),
    "conv2d-tuples": (
        2,
        {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 2), "kernel_size": (3, 2)},
    ),
    "conv2d-same-uneven": (2, {"kernel_size": 2, "padding": "same"}),
    "conv2d-same-uneven-circular": (
        2,
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    ),
    "conv3d-tuples": (3, {"stride": (1, 2, 1), "padding": (1, 0, 2)}),
    "conv2d-no-bias": (2, {"bias": False}),
    "conv2d-groups": (2, {"groups": 2, "padding": 1}),
    "conv1d-depthwise": (1, {"groups": 4, "padding": "same", "padding_mode": "reflect"}),
}

GROUPED = [name for name, (_, how) in CONVOLUTIONS.items() if "groups" in how]
UNGROUPED = [name for name in CONVOLUTIONS if name not in GROUPED]
FEW = [
    "conv1d-reflect-same",
    "conv1d-stride-dilation",
    "conv2d-tuples",
    "conv2d-same-uneven-circular",
    "conv2d-no-bias",
    "conv3d-zeros-1",
]
"""For what only passes their statistics on."""


def convolution(name, dtype=torch.float64):
    """A layer and a function that makes ``n`` images for it."""
    dims, how = CONVOLUTIONS[name]
    layer = KINDS[dims](**(COMMON | how), dtype=dtype)
    shape = (layer.in_channels, *SIZES[:dims])
    with warnings.catch_warnings():  # torch says once that uneven "same" padding makes a copy
        warnings.simplefilter("ignore")
        with torch.no_grad():
            layer(torch.zeros(1, *shape, dtype=dtype))
    return layer, lambda n: torch.randn(n, *shape, dtype=dtype)
