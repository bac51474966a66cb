"""Errors of factors that are stored in half precision against float64, over many updates.

One square layer trains with a learning rate of 0 under copies of one optimizer: the reference in
float64, the others in float32 with their factors stored in float32, bfloat16 and float16. All see
the same rows, made of a mean and a few directions that drift, and noise. From time to time all
precondition the same gradient, with singular values 1, 1/2, 1/3, ...; the table has the relative
error of the result against float64's, and last that of the direction alone.

    python benchmarks/precision.py --out precision.json
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mkor import MKOR, DenseMKOR
from mkor.bench.results import FORMAT, environment, write_record
from mkor.bench.show import print_table

KINDS = {"window": MKOR}
KINDS |= {
    f"dense, {rule}": partial(DenseMKOR, rule=rule, update_every=1)
    for rule in ("exact", "paper", "release")
}
REFERENCE = (torch.float64, None)
STORED = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED, ROWS, DIRECTIONS, TURN, MEAN, NOISE = 0, 512, 8, 0.05, 0.5, 0.5


class Rows:
    """A distribution of rows `[ROWS, width]` that drifts: `mean + directions . normal + noise`."""

    def __init__(self, width: int, scale: float, generator: torch.Generator) -> None:
        self.scale, self.generator, self.width = scale, generator, width
        self.moving = self.normal(1 + DIRECTIONS, width)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def next(self) -> Tensor:
        self.moving = math.sqrt(1 - TURN**2) * self.moving
        self.moving += TURN * self.normal(*self.moving.shape)
        mean, *directions = self.moving
        along = self.normal(ROWS, DIRECTIONS) @ torch.stack(directions) / math.sqrt(DIRECTIONS)
        return self.scale * (MEAN * mean + along + NOISE * self.normal(ROWS, self.width))


class Copy:
    """The layer and its optimizer in one precision."""

    def __init__(self, make, width: int, dtype: torch.dtype, stored: torch.dtype | None) -> None:
        self.layer, self.dtype = nn.Linear(width, width, bias=False, dtype=dtype), dtype
        base = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        self.optimizer = make(
            self.layer, base, factor_dtype=stored, rescale=None, skip_output=False
        )

    def step(self, x: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
        """Learns from rows `x`, `g` `[ROWS, width]` and preconditions `gradient`, to float64."""
        self.layer(x.to(self.dtype)).backward(g.to(self.dtype))
        self.layer.weight.grad.copy_(gradient)
        self.optimizer.step()
        return self.layer.weight.grad.double()


def fixed_gradient(width: int) -> Tensor:
    """`[width, width]`, float64, of norm 1, with singular values that fall as 1, 1/2, 1/3, ..."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(normal).Q
    M = (U / torch.arange(1, width + 1)) @ V.mT
    return M / M.norm()


def follow(make, width: int, updates: int, scale: float) -> dict[str, list[tuple[float, float]]]:
    """Errors of result and direction after 1, 10, 100, ... updates, by what is stored."""
    copies = {name: Copy(make, width, torch.float32, stored) for name, stored in STORED.items()}
    exact = Copy(make, width, *REFERENCE)
    generator, gradient = torch.Generator().manual_seed(SEED), fixed_gradient(width)
    inputs, outputs = Rows(width, 1.0, generator), Rows(width, scale, generator)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in copies}
    for number in range(1, updates + 1):
        x, g = inputs.next(), outputs.next()
        Q = exact.step(x, g, gradient)
        for name, copy in copies.items():
            P = copy.step(x, g, gradient)
            if number in marks(updates):
                direction = P / P.norm() - Q / Q.norm()
                found[name].append((float((P - Q).norm() / Q.norm()), float(direction.norm())))
    return found


def marks(updates: int) -> list[int]:
    return sorted({updates, *(10**power for power in range(9) if 10**power < updates)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--width", type=int, default=256)
    add("--updates", type=int, default=1000)
    add("--scales", default="0.01,1,1e-4,1e-6,1e-8", help="typical entries of output gradients")
    add("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    points = []
    for scale in map(float, arguments.scales.split(",")):
        rows = []
        for kind, make in KINDS.items():
            for name, errors in follow(make, arguments.width, arguments.updates, scale).items():
                cells = (f"{error:.1e}" for error, _ in errors)
                rows.append((f"{kind}, {name}", *cells, f"{errors[-1][1]:.1e}"))
                points.append({"kind": kind, "stored": name, "scale": scale, "errors": errors})
        print(f"\noutput gradients of {scale:g}")
        print_table(("updates", *map(str, marks(arguments.updates)), "direction"), rows, sys.stdout)
    if arguments.out:
        record = {"format": FORMAT, "environment": environment(), "width": arguments.width}
        write_record(
            record | {"updates": marks(arguments.updates), "points": points}, arguments.out
        )


if __name__ == "__main__":
    main()
