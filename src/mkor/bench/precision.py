"""Errors of factors in half precision against float64, over many updates.

The same statistics go to a float64 reference and to copies whose factors are stored in less; from
time to time all of them precondition the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import mkor
from mkor.curvature.contract import SIDES, Curvature, Statistics

from .drift import cast, drifting, gradient_of, square_shape
from .precision_page import REFERENCE, Health, Point, is_mark, write
from .precision_plot import draw
from .progress import Progress

WIDTHS = (256, 1024)
UPDATES = 1000
SEED = 0
# Typical entries of output gradients; others than the usual are followed for fewer updates.
SCALE = 0.01
OTHER_SCALES = (1.0, 1e-4, 1e-6, 1e-8)
FEWER_UPDATES = 100
# Arithmetic, and what the factors are stored in.
PRECISIONS: Mapping[str, tuple[torch.dtype, torch.dtype | None]] = {
    REFERENCE: (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}

Make = Callable[..., Curvature]


def kinds() -> dict[str, Make]:
    """The factors that can be stored in half precision, each with its defaults.

    Returns:
        Makers by name, all with the keyword `factor_dtype`.
    """
    rules = ("exact", "paper", "release")
    dense: dict[str, Make] = {
        f"dense, {rule}": partial(mkor.DenseInverse, rule=rule) for rule in rules
    }
    return {"window": mkor.Window, **dense}


def marks(updates: int) -> list[int]:
    """When gradients are preconditioned: 1, 2, 5, 10, 20, 50, ...

    Args:
        updates: How many updates there are.

    Returns:
        Numbers up to and including the last.
    """
    series = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return sorted({updates, *(number for number in series if number < updates)})


def health_of(factor: Tensor) -> Health:
    """Whether an inverse is what it should be.

    Args:
        factor: A matrix of any dtype.

    Returns:
        Its state, judged in float64.
    """
    H = factor.double()
    if not bool(H.isfinite().all()):
        return Health(finite=False)
    values = torch.linalg.eigvalsh(H)
    smallest, largest = float(values[0]), float(values[-1])
    rounding = len(H) * torch.finfo(H.dtype).eps * float(values.abs().max())
    positive = "unclear" if abs(smallest) <= rounding else "yes" if smallest > 0 else "no"
    return Health(True, float((H - H.mT).abs().max()), smallest, largest, positive)


class Copy:
    """A layer's factors in one precision.

    Attributes:
        precision: Its name.
    """

    def __init__(self, precision: str, make: Make, width: int) -> None:
        """Starts with no update.

        Args:
            precision: One of `PRECISIONS`.
            make: Makes the curvature.
            width: Of the layer.
        """
        dtype, stored = PRECISIONS[precision]
        self.precision = precision
        self.curvature = make(factor_dtype=stored)
        self.shape = square_shape(width, dtype)
        self.state = self.curvature.init(self.shape)

    def update(self, statistics: Statistics) -> None:
        """Takes an update.

        Args:
            statistics: In float64.
        """
        self.curvature.update(self.state, cast(statistics, self.shape.dtype))

    def precondition(self, gradient: Tensor) -> Tensor:
        """Preconditions a gradient.

        Args:
            gradient: `[1, d, d]`, float64.

        Returns:
            The result in float64; not a number where the curvature refused it.
        """
        W = gradient.to(self.shape.dtype, copy=True)
        prepared = self.curvature.prepare(self.state, self.shape)
        ok = self.curvature.apply(prepared, W, None, torch.ones(1, dtype=torch.bool))
        return torch.where(ok[:, None, None], W.double(), float("nan"))

    def health(self) -> dict[str, Health]:
        """The state of each side's explicit inverse.

        Returns:
            Nothing for factors that are no inverses.
        """
        keys = {side: f"{side}_inverse" for side in SIDES}
        return {
            side: health_of(self.state[key][0]) for side, key in keys.items() if key in self.state
        }


def distance(P: Tensor, Q: Tensor) -> float:
    """Relative error in the Frobenius norm.

    Args:
        P: What is judged.
        Q: What it should be.

    Returns:
        `|P - Q| / |Q|`.
    """
    return float((P - Q).norm() / Q.norm())


def digits(error: float) -> float:
    """How many digits are right.

    Args:
        error: A relative error.

    Returns:
        Its negative decimal logarithm, 0 where the error is no number.
    """
    return -math.log10(error) if 0 < error < math.inf else 0.0


@dataclass(frozen=True)
class Setting:
    """What is followed.

    Attributes:
        kind: Of the factors.
        make: Makes them.
        width: Of the layer.
        updates: How many.
        scale: Typical entry of the output gradients.
    """

    kind: str
    make: Make
    width: int
    updates: int
    scale: float = SCALE


def compare(
    setting: Setting, copies: Sequence[Copy], gradient: Tensor, updates: int
) -> list[Point]:
    """Compares all precisions with the first.

    Args:
        setting: What is followed.
        copies: The reference, then the others.
        gradient: What they precondition.
        updates: How many they have taken.

    Returns:
        A point for each.
    """
    results = [copy.precondition(gradient) for copy in copies]
    judge = is_mark(updates, setting.updates)
    Q = results[0]
    return [
        Point(
            kind=setting.kind,
            width=setting.width,
            precision=copy.precision,
            scale=setting.scale,
            updates=updates,
            error=distance(P, Q),
            direction_error=distance(P / P.norm(), Q / Q.norm()),
            health=copy.health() if judge else None,
        )
        for copy, P in zip(copies, results, strict=True)
    ]


@torch.no_grad()
def follow(setting: Setting, progress: Progress) -> list[Point]:
    """Gives the same statistics to all precisions of one kind of factor.

    Args:
        setting: What is followed.
        progress: Where updates are reported.

    Returns:
        The points.
    """
    copies = [Copy(precision, setting.make, setting.width) for precision in PRECISIONS]
    gradient = gradient_of(setting.width, SEED)
    points: list[Point] = []
    scales = {"left": setting.scale, "right": 1.0}
    source = drifting(copies[0].curvature, setting.width, scales, SEED)
    for number, statistics in enumerate(islice(source, setting.updates), 1):
        for copy in copies:
            copy.update(statistics)
        if number in marks(setting.updates):
            points += compare(setting, copies, gradient, number)
        progress.advance(setting.kind, number, digits(points[-1].error))
    return points


def reproduce(
    out: Path,
    progress: Progress,
    widths: Sequence[int] = WIDTHS,
    updates: int = UPDATES,
) -> None:
    """Measures everything and writes `precision.json`, `.png` and `.md`.

    Args:
        out: The folder; prose outside the marked part of `precision.md` stays.
        progress: Where updates are reported.
        widths: Of the layers.
        updates: How many.
    """
    makers = kinds()
    runs = [(width, updates, SCALE) for width in widths]
    runs += [(min(widths), min(updates, FEWER_UPDATES), scale) for scale in OTHER_SCALES]
    progress.expect(len(makers) * sum(count for _, count, _ in runs))
    points: list[Point] = []
    for width, count, scale in runs:
        title = f"width {width}, gradients {scale:g}"
        progress.phase(title, list(makers), count, unit="digits in float16")
        for kind, make in makers.items():
            points += follow(Setting(kind, make, width, count, scale), progress)
    write(points, SCALE, out)
    draw([point for point in points if point.scale == SCALE], out / "precision.png")
