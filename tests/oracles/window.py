"""The mathematics of DESIGN section 2 once more: float64, dense, naive. Imports nothing of mkor.

One convention: rows are samples. A *call* is one use of a layer in one micro-batch, a pair of
``a [n, rows, d_in]`` (inputs) and ``g [n, rows, d_out]`` (raw gradients of the loss with respect to
the layer's outputs); the first dimension is the batch, the second the rows of one sample. ``M`` is
``[d_out, d_in (+ 1)]``: the gradient of the weight and, in the last column, of the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional

Call = tuple[torch.Tensor, torch.Tensor]

# ------------------------------------------------------------------------------------------ rows


def linear_call(x: torch.Tensor, g: torch.Tensor) -> Call:
    """``x [n, ..., d_in]`` and ``g [n, ..., d_out]`` as one call; without a batch: one sample."""
    if x.dim() == 1:
        x, g = x[None], g[None]
    return (
        x.double().reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]),
        g.double().reshape(len(g), math.prod(g.shape[1:-1]), g.shape[-1]),
    )


def padded(layer, x: torch.Tensor) -> torch.Tensor:
    """``x`` as the convolution sees it: every kind of padding written out."""
    n = len(layer.kernel_size)
    if layer.padding == "valid":
        sides = [(0, 0)] * n
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    flat = [p for side in reversed(sides) for p in side]  # pad counts from the last dimension
    return functional.pad(x, flat, mode=mode)


def patches(layer, x: torch.Tensor) -> torch.Tensor:
    """Every patch of every image, ``[n, positions, channels, kernel]``: the brute-force unfold."""
    x = padded(layer, x)
    n = len(layer.kernel_size)
    for i in range(n):
        k, d, s = layer.kernel_size[i], layer.dilation[i], layer.stride[i]
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    positions, channels, kernel = range(2, 2 + n), 1, range(2 + n, 2 + 2 * n)
    x = x.permute(0, *positions, channels, *kernel)
    return x.reshape(len(x), math.prod(x.shape[1 : 1 + n]), x.shape[1 + n], -1)


def conv_calls(layer, x: torch.Tensor, g: torch.Tensor) -> list[Call]:
    """One call per group of a convolution: its patches and the gradients of its outputs."""
    if x.dim() == len(layer.kernel_size) + 1:
        x, g = x[None], g[None]
    rows = patches(layer, x.double())
    outputs = g.double().flatten(2).transpose(1, 2)
    return [
        (a.flatten(2), g_group)
        for a, g_group in zip(
            rows.chunk(layer.groups, dim=2), outputs.chunk(layer.groups, dim=2), strict=True
        )
    ]


def with_ones(a: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


def gradient(calls: list[Call], bias: bool) -> torch.Tensor:
    """``M = sum over rows of g a^T``, what autograd must have found."""
    return sum(torch.einsum("bro,bri->oi", g, with_ones(a) if bias else a) for a, g in calls)


# ------------------------------------------------------------------------------------ statistics


@dataclass
class Statistics:
    """What one update learns of one layer: the vectors and the mean square of each side."""

    a: list[torch.Tensor]
    g: list[torch.Tensor]
    a_square: float
    g_square: float


def statistics(calls: list[Call], vectors: int, bias: bool) -> Statistics:
    """Section 2.2 with ``rows=None``: part ``j`` of every call goes into slot ``j``."""
    total = sum(a.shape[0] * a.shape[1] for a, _ in calls)
    slots_a, slots_g = [], []
    for j in range(vectors):
        parts = [(a.tensor_split(vectors)[j], g.tensor_split(vectors)[j]) for a, g in calls]
        slots_a.append(torch.cat([a.flatten(0, 1) for a, _ in parts]))
        slots_g.append(torch.cat([g.flatten(0, 1) for _, g in parts]) * total)
    if bias:
        slots_a = [with_ones(a) for a in slots_a]
    return Statistics(
        a=[rows.mean(0) for rows in slots_a if len(rows)],
        g=[rows.mean(0) for rows in slots_g if len(rows)],
        a_square=torch.cat(slots_a).square().mean().item(),
        g_square=torch.cat(slots_g).square().mean().item(),
    )


def in_runs(calls: list[Call]) -> list[Call]:
    """The same rows without samples: what a batch with too few rows for ``rows=m`` is cut from."""
    return [(a.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None]) for a, g in calls]


def chunk_statistics(call: Call, chunks: list[list[int]], bias: bool) -> Statistics:
    """Section 2.2 with ``rows=m``: only the rows in ``chunks`` count, one vector per chunk."""
    a, g = call[0].flatten(0, 1), call[1].flatten(0, 1)
    a, g = with_ones(a) if bias else a, len(g) * g
    used = [row for chunk in chunks for row in chunk]
    return Statistics(
        a=[a[chunk].mean(0) for chunk in chunks],
        g=[g[chunk].mean(0) for chunk in chunks],
        a_square=a[used].square().mean().item(),
        g_square=g[used].square().mean().item(),
    )


# ---------------------------------------------------------------------------------------- window


def running_mean(values, gamma: float):
    """The average with momentum ``gamma`` of all numbers or tensors so far, bias-corrected."""
    average = 0.0
    for value in values:
        average = gamma * average + (1 - gamma) * value
    return average / (1 - gamma ** len(values))


def window_terms(
    updates: list[list[torch.Tensor]], rank: int, gamma: float
) -> list[tuple[float, torch.Tensor]]:
    """Weight and vector of each row that is still in the window, newest first."""
    t = len(updates)
    terms = [
        ((1 - gamma) * gamma**age / (len(vectors) * (1 - gamma**t)), v)
        for age, vectors in enumerate(reversed(updates))
        for v in reversed(vectors)
    ]
    return terms[:rank]


def window_matrix(
    updates: list[list[torch.Tensor]], lam: float, rank: int, gamma: float
) -> torch.Tensor:
    """``S = lambda I + sum_i w_i v_i v_i^T``, section 2.3, as a matrix."""
    d = len(updates[-1][0])
    S = lam * torch.eye(d, dtype=torch.float64)
    for w, v in window_terms(updates, rank, gamma):
        S = S + w * torch.outer(v, v)
    return S


def window_inverse(
    updates: list[list[torch.Tensor]], squares: list[float], rank: int, gamma: float, damping: float
) -> torch.Tensor:
    """``S^-1`` without its constant ``1/lambda``; the identity where ``lambda`` is 0."""
    lam = damping * running_mean(squares, gamma)
    S = window_matrix(updates, lam, rank, gamma)
    if lam == 0:
        return torch.eye(len(S), dtype=torch.float64)
    return lam * torch.linalg.inv(S)


# ------------------------------------------------------------------------------------------ twin


@dataclass(kw_only=True)
class Layer:
    """A layer (or one group of a grouped one): a subclass learns from calls and gives factors."""

    bias: bool
    momentum: float
    rescale: str | None = None
    sides: str = "both"
    updates: int = 0
    norms: list[tuple[float, float]] = field(default_factory=list)

    def update(self, calls: list[Call], number: int | None = None) -> None:
        """Learn from one update, the optimizer's ``number``-th from 0, or this layer's own."""
        number = self.updates if number is None else number
        self.learn(calls, number)
        self.updates += 1
        self.refresh(number)

    def learn(self, calls: list[Call], number: int) -> None:
        raise NotImplementedError

    def refresh(self, number: int) -> None:
        """What an update does to layers that have learned something, in it or before it."""

    @property
    def ready(self) -> bool:
        """Whether there are factors to precondition with."""
        return self.updates > 0

    def left(self) -> torch.Tensor:
        raise NotImplementedError

    def right(self) -> torch.Tensor:
        raise NotImplementedError

    def product(self, M: torch.Tensor) -> torch.Tensor:
        """``P = L^-1 M R^-1``, section 2.4."""
        P = M.double()
        if self.sides in ("both", "left"):
            P = self.left() @ P
        if self.sides in ("both", "right"):
            P = P @ self.right()
        return P

    def precondition(self, M: torch.Tensor) -> torch.Tensor:
        """The product, then the rescaling asked for."""
        P = self.product(M)
        self.norms.append((M.double().norm().item(), P.norm().item()))
        return P * self.scale()

    def scale(self) -> float:
        if self.rescale is None:
            return 1.0
        raw, new = self.norms[-1]
        if self.rescale == "running":
            raw = running_mean([m for m, _ in self.norms], self.momentum)
            new = running_mean([p for _, p in self.norms], self.momentum)
        return raw / new if new else 1.0


@dataclass(kw_only=True)
class TwinLayer(Layer):
    """Window factors, from the layer's whole history."""

    rank: int
    vectors: int
    damping: float
    history: list[Statistics] = field(default_factory=list)

    def learn(self, calls: list[Call], number: int) -> None:
        self.history.append(statistics(calls, self.vectors, self.bias))

    def right(self) -> torch.Tensor:
        return self.inverse([s.a for s in self.history], [s.a_square for s in self.history])

    def left(self) -> torch.Tensor:
        return self.inverse([s.g for s in self.history], [s.g_square for s in self.history])

    def inverse(self, updates: list[list[torch.Tensor]], squares: list[float]) -> torch.Tensor:
        return window_inverse(updates, squares, self.rank, self.momentum, self.damping)
