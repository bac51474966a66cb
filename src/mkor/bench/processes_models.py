"""A model with the matrices of BERT, for counting what is sent."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from .compare import sizes_of
from .errors import UsageError
from .worker import Subject

BERT = "bert-base-shapes"
BERT_SIZES = {"width": 768, "depth": 12, "rows": 64}
INNER = 4
OUTPUTS = 2
SEED = 0


class Block(nn.Module):
    """The linear layers of an encoder layer, every row by itself: no attention between them."""

    def __init__(self, width: int) -> None:
        """Makes the layers.

        Args:
            width: Of the model.
        """
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, INNER * width), nn.Linear(INNER * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Through the block.

        Args:
            x: `[n, width]`.

        Returns:
            `[n, width]`.
        """
        mixed = torch.sigmoid(self.query(x)) * self.key(x) + self.value(x)
        x = torch.as_tensor(self.first(x + self.output(mixed)))
        return torch.as_tensor(self.second(x + self.outer(functional.gelu(self.inner(x)))))


def bert_subject(arguments: argparse.Namespace) -> Subject:
    """The linear layers of BERT's encoder, without its embeddings, on random numbers.

    Args:
        arguments: The parsed command line.

    Returns:
        The subject.

    Raises:
        UsageError: If it has no such size.
    """
    given = {**sizes_of(arguments), "rows": arguments.rows}
    given = {key: value for key, value in given.items() if value}
    for key in given:
        if key not in BERT_SIZES:
            raise UsageError(f"{BERT} has no --{key}; its sizes are --width, --depth, --rows.")
    sizes = {**BERT_SIZES, **{key: value for key, value in given.items() if value}}
    generator = torch.Generator().manual_seed(SEED)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            blocks = (Block(sizes["width"]) for _ in range(sizes["depth"]))
            return nn.Sequential(*blocks, nn.Linear(sizes["width"], OUTPUTS))

    def normal(columns: int) -> Tensor:
        return torch.randn(sizes["rows"], columns, generator=generator)

    batch = (normal(sizes["width"]), normal(OUTPUTS))
    return Subject(BERT, sizes, build, functional.mse_loss, batch)


def subject_of(arguments: argparse.Namespace) -> Subject:
    """What the command line asks to be trained.

    Args:
        arguments: The parsed command line.

    Returns:
        The subject.
    """
    # It offers this command too, and so imports it.
    from .overhead import make_subject

    return bert_subject(arguments) if arguments.model == BERT else make_subject(arguments)
