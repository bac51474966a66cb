"""Tasks on real data that need no download: a model, data with a fingerprint, a loss.

`text-lm` is a character transformer on the source of Python's standard library; the others read
the handwritten digits that come with scikit-learn.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cli import MissingExtraError, UnknownNameError, UsageError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A thing to be learned, the same for all contestants."""

    name: str
    sizes: Mapping[str, int]  # width, depth, batch and so on, as they came out
    steps: int  # how long a run is unless told otherwise
    data: str  # one line on the data
    sha256: str  # the fingerprint of the data; results compare within one only
    build: Callable[[], nn.Module]  # makes a model from torch's random state
    # From the model's output and the target to a mean loss.
    loss: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[torch.Generator], Batch]  # the next training batch of a random stream
    held_out: tuple[Batch, ...]  # batches that no run trains on


def new_model(task: Task, seed: int) -> nn.Module:
    """The task's model in training mode, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build()


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """An endless stream of training batches, a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield task.draw(generator)


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module) -> float:
    """The mean loss on the held-out batches, infinite where it is not finite."""
    model.eval()
    total = sum(float(task.loss(model(x), y)) * len(x) for x, y in task.held_out)
    model.train()
    loss = total / sum(len(x) for x, _ in task.held_out)
    return loss if math.isfinite(loss) else math.inf


# Handwritten digits

SIDE, LARGE_SIDE = 8, 32
PIXELS = SIDE * SIDE
CLASSES = 10
BOTTLENECK = 8
HELD_OUT_SHARE = 5


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], `[images, 64]`, and their labels, `[images]`."""

    train: Batch
    held_out: Batch
    sha256: str


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """Loads the 1,797 images; every fifth of a fixed permutation is held out."""
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
    """A classifier of `depth` fully connected layers."""
    widths = [PIXELS, *[width] * (depth - 1)]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def conv_net(width: int, depth: int, side: int = SIDE) -> nn.Module:
    """A classifier of 3x3 convolutions with `width`, twice, then four times as many channels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    inputs = 1
    for index in range(depth):
        outputs = width * min(2**index, 4)
        # All but the first halve the image while it lasts.
        stride = 2 if index and side > 2 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
        inputs, side = outputs, side // stride
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, CLASSES))


def autoencoder(width: int, depth: int) -> nn.Module:
    """A tanh autoencoder of `depth` layers whose widths shrink to a bottleneck and grow again."""
    half = depth // 2
    ratio = (BOTTLENECK / width) ** (1 / max(1, half - 1))
    down = [PIXELS, *(round(width * ratio**index) for index in range(half - 1)), BOTTLENECK]
    widths = down + down[-2::-1]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over pixels, mean over images; that of the mean image is about 4.7."""
    return (output - target).square().sum(dim=1).mean()


def enlarged(images: Tensor) -> Tensor:
    """Images of 8x8 as images of 32x32, `[images, 1024]`."""
    small = images.view(-1, 1, SIDE, SIDE)
    return functional.interpolate(small, size=(LARGE_SIDE,) * 2, mode="bilinear").flatten(1)


def digits_task(
    name: str,
    sizes: Mapping[str, int],
    net: Callable[[int, int], nn.Module],
    *,
    steps: int = 300,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    pairs: Callable[[Tensor, Tensor], Batch] = lambda images, labels: (images, labels),
    note: str = "",
) -> Task:
    """A task on the digits; `net` takes width and depth, `pairs` makes inputs and targets."""
    digits = load_digits()
    inputs, targets = pairs(*digits.train)
    count = len(inputs) + len(digits.held_out[0])

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randperm(len(inputs), generator=generator)[: sizes["batch"]]
        return inputs[rows], targets[rows]

    return Task(
        name=name,
        sizes=sizes,
        steps=steps,
        data=f"scikit-learn's handwritten digits, {count:,} images of {SIDE}x{SIDE}{note}",
        sha256=digits.sha256,
        build=lambda: net(sizes["width"], sizes["depth"]),
        loss=loss,
        draw=draw,
        held_out=(pairs(*digits.held_out),),
    )


# Characters of Python's standard library

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
    """The Python files below a folder, without tests and machine-made ones."""
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
    """Character ids of a text, one per byte, as uint8."""
    return torch.frombuffer(bytearray(text.translate(_IDS)), dtype=torch.uint8)


@lru_cache(maxsize=1)
def load_corpus() -> Corpus:
    """Reads the standard library of the running interpreter, once."""
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
    """A pre-norm transformer block with heads of at least `head_width`."""

    def __init__(self, width: int, head_width: int = HEAD_WIDTH, *, is_causal: bool = True) -> None:
        """Makes a block with a residual stream of `width`."""
        super().__init__()
        self.heads, self.is_causal = max(1, width // head_width), is_causal
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
        """Self-attention over a normalised stream, `[batch, context, width]`."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream, `[batch, context, width]`, after attention and MLP."""
        x = x + self.attend(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CharacterTransformer(nn.Module):
    """Learned positions, pre-norm blocks, an untied head."""

    def __init__(self, width: int, depth: int, context: int, embedding_std: float) -> None:
        """Makes `depth` blocks; embeddings begin with a standard deviation of `embedding_std`."""
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=embedding_std)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next character, `[batch, context, vocabulary]`, for `[batch, context]`."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.characters(ids) + self.positions(places)
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def next_character_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats, of `[batch, context, vocabulary]` and `[batch, context]`."""
    return functional.cross_entropy(scores.flatten(0, 1), target.flatten())


def windows(text: Tensor, starts: Tensor, context: int) -> Batch:
    """Cuts windows out of a text: the characters, and those to be predicted, one further on."""
    cut = text[starts[:, None] + torch.arange(context + 1)].long()
    return cut[:, :-1], cut[:, 1:]


def held_out_batches(text: Tensor, context: int) -> tuple[Batch, ...]:
    """Fixed windows, evenly spread over a text, in batches of about 4,096 characters."""
    count = max(1, HELD_OUT_TOKENS // context)
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    return tuple(
        windows(text, some, context) for some in torch.split(starts, max(1, 4096 // context))
    )


def text_task(name: str, sizes: Mapping[str, int], embedding_std: float) -> Task:
    """A task of predicting the next character."""
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
        name=name,
        sizes=sizes,
        steps=200,
        data=f"source of Python's standard library, {corpus.files} files, "
        f"{(len(corpus.train) + len(corpus.held_out)) / 1e6:.1f} MB",
        sha256=corpus.sha256,
        build=lambda: CharacterTransformer(width, sizes["depth"], context, embedding_std),
        loss=next_character_loss,
        draw=draw,
        held_out=held_out_batches(corpus.held_out, context),
    )


# The table of tasks


@dataclass(frozen=True)
class Recipe:
    """How a task is made of name and sizes, its own sizes, and the least depth."""

    make: Callable[[str, Mapping[str, int]], Task]
    sizes: Mapping[str, int]
    least_depth: int = 1


_TEXT = {"width": 96, "depth": 3, "batch": 16, "context": 64}
_LARGE = partial(
    digits_task,
    net=partial(conv_net, side=LARGE_SIDE),
    steps=200,
    pairs=lambda images, labels: (enlarged(images), labels),
    note=f", enlarged to {LARGE_SIDE}x{LARGE_SIDE}",
)
_AUTOENCODER = partial(
    digits_task,
    net=autoencoder,
    steps=600,
    loss=squared_error,
    pairs=lambda images, labels: (images, images),
)
TASKS: Mapping[str, Recipe] = {
    "text-lm": Recipe(partial(text_task, embedding_std=GPT2_STD), _TEXT),
    "text-lm-torch-init": Recipe(partial(text_task, embedding_std=TORCH_STD), _TEXT),
    "digits-mlp": Recipe(partial(digits_task, net=mlp), {"width": 128, "depth": 3, "batch": 64}),
    "digits-conv": Recipe(
        partial(digits_task, net=conv_net), {"width": 16, "depth": 3, "batch": 64}
    ),
    "digits-large": Recipe(_LARGE, {"width": 8, "depth": 5, "batch": 64}),
    "digits-autoencoder": Recipe(
        _AUTOENCODER, {"width": 128, "depth": 8, "batch": 128}, least_depth=2
    ),
}


def load_task(name: str, sizes: Mapping[str, int | None] | None = None) -> Task:
    """Loads a task and its data; sizes of None are the task's own."""
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    recipe = TASKS[name]
    wanted = {key: value for key, value in (sizes or {}).items() if value is not None}
    for key, value in wanted.items():
        if key not in recipe.sizes:
            known = ", ".join(f"--{size}" for size in recipe.sizes)
            raise UsageError(f"{name} has no --{key}; its sizes are {known}.")
        least = recipe.least_depth if key == "depth" else 1
        if value < least:
            raise UsageError(f"{name}: --{key} must be at least {least}, not {value}.")
    return recipe.make(name, {**recipe.sizes, **wanted})
