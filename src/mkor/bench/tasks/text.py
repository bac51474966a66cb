"""A character transformer on the source text of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError
from .base import Batch, Task

SIZES = {"width": 96, "depth": 3, "batch": 16, "context": 64}
STEPS = 200
HEAD_WIDTH = 32
# The usual spread of a language model's embeddings, GPT-2's, and torch's own. The latter suits
# AdamW better here: held-out loss 2.38 instead of 2.48 after 200 steps (2 and 3 seeds), 1.79
# instead of 1.85 after 800 (one seed); so there is a task for each.
GPT2_STD, TORCH_STD = 0.02, 1.0
HELD_OUT_TOKENS = 16_384
HELD_OUT_EVERY = 10

# One id for each common character, id 0 for all the rest.
CHARACTERS = bytes([ord("\n"), *range(ord(" "), ord("~") + 1)])
VOCABULARY = len(CHARACTERS) + 1
_IDS = bytes(CHARACTERS.find(byte) + 1 for byte in range(256))

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# These are written when Python is built or set up and differ from machine to machine.
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Corpus:
    """The text as character ids, whole files either trained on or held out."""

    train: Tensor
    held_out: Tensor
    files: int
    sha256: str


def source_files(root: Path) -> list[Path]:
    """The Python files below a folder, without tests and machine-made ones.

    Args:
        root: Where to look.

    Returns:
        The files in an order that does not depend on the file system.
    """
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [
        file
        for file in files
        if not _SKIPPED_FOLDERS.intersection(file.parts[:-1])
        and not file.parts[0].startswith("config-")
        and not file.name.startswith(_SKIPPED_PREFIXES)
    ]
    return [root / file for file in sorted(kept, key=lambda file: file.as_posix())]


def encode(text: bytes) -> Tensor:
    """Character ids of a text.

    Args:
        text: The text as bytes.

    Returns:
        One id per byte, as uint8.
    """
    return torch.frombuffer(bytearray(text.translate(_IDS)), dtype=torch.uint8)


@lru_cache(maxsize=1)
def load_corpus() -> Corpus:
    """Reads the standard library of the running interpreter, once.

    Returns:
        The corpus; every tenth file is held out.

    Raises:
        UsageError: If the interpreter comes without its source.
    """
    files = source_files(Path(sysconfig.get_paths()["stdlib"]))
    texts = [file.read_bytes().replace(b"\r\n", b"\n") for file in files]
    held_out = b"".join(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    if len(held_out) < 2 * HELD_OUT_TOKENS:
        raise UsageError(
            "text-lm reads the source of Python's standard library, which this interpreter "
            "lacks; use another interpreter or one of the digits tasks."
        )
    del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = b"".join(texts)
    sha256 = hashlib.sha256(train + held_out).hexdigest()
    return Corpus(encode(train), encode(held_out), len(files), sha256)


class Block(nn.Module):
    """A pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        """Makes the block.

        Args:
            width: Width of the residual stream.
            heads: Number of attention heads.
        """
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention.

        Args:
            x: Normalised stream, `[batch, context, width]`.

        Returns:
            What attention adds to the stream, of the same shape.
        """
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """One block.

        Args:
            x: The residual stream, `[batch, context, width]`.

        Returns:
            The stream after attention and MLP.
        """
        x = x + self.attend(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CharacterTransformer(nn.Module):
    """Learned positions, pre-norm blocks, an untied head."""

    def __init__(self, width: int, depth: int, context: int, embedding_std: float) -> None:
        """Makes the model.

        Args:
            width: Width of the residual stream.
            depth: Number of blocks.
            context: Largest number of characters in a window.
            embedding_std: Spread of the embeddings at the start.
        """
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=embedding_std)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next character.

        Args:
            ids: Character ids, `[batch, context]`.

        Returns:
            Scores, `[batch, context, vocabulary]`.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.characters(ids) + self.positions(places)
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def next_character_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over all characters.

    Args:
        scores: `[batch, context, vocabulary]`.
        target: `[batch, context]`.

    Returns:
        The mean loss in nats per character.
    """
    return functional.cross_entropy(scores.flatten(0, 1), target.flatten())


def windows(text: Tensor, starts: Tensor, context: int) -> Batch:
    """Cuts windows out of a text.

    Args:
        text: Character ids.
        starts: Where the windows begin.
        context: Characters in a window.

    Returns:
        The characters and, shifted by one, those to be predicted.
    """
    cut = text[starts[:, None] + torch.arange(context + 1)].long()
    return cut[:, :-1], cut[:, 1:]


def held_out_batches(text: Tensor, context: int) -> tuple[Batch, ...]:
    """Fixed windows, evenly spread over the held-out text.

    Args:
        text: Held-out character ids.
        context: Characters in a window.

    Returns:
        Batches of about 4,096 characters each.
    """
    count = max(1, HELD_OUT_TOKENS // context)
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    return tuple(
        windows(text, some, context) for some in torch.split(starts, max(1, 4096 // context))
    )


def text_lm(sizes: Mapping[str, int], embedding_std: float = GPT2_STD) -> Task:
    """The task `text-lm`, or `text-lm-torch-init` with torch's own embeddings.

    Args:
        sizes: Width, depth, batch and context.
        embedding_std: Spread of the embeddings at the start.

    Returns:
        The task.

    Raises:
        UsageError: If the width cannot be divided among the heads.
    """
    width, context = sizes["width"], sizes["context"]
    heads = max(1, width // HEAD_WIDTH)
    if width % heads:
        raise UsageError(
            f"text-lm: a width of {width} cannot be divided among {heads} heads; "
            f"use a multiple of {HEAD_WIDTH}."
        )
    corpus = load_corpus()

    def draw(generator: torch.Generator) -> Batch:
        last = len(corpus.train) - context
        starts = torch.randint(last, (sizes["batch"],), generator=generator)
        return windows(corpus.train, starts, context)

    return Task(
        name="text-lm" if embedding_std == GPT2_STD else "text-lm-torch-init",
        sizes=sizes,
        steps=STEPS,
        data=f"source of Python's standard library, {corpus.files} files, "
        f"{(len(corpus.train) + len(corpus.held_out)) / 1e6:.1f} MB",
        sha256=corpus.sha256,
        build=lambda: CharacterTransformer(width, sizes["depth"], context, embedding_std),
        loss=next_character_loss,
        draw=draw,
        held_out=held_out_batches(corpus.held_out, context),
    )
