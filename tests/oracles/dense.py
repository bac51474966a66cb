"""Section 2.3's dense rules, KFAC and Eva as in ``oracles``: float64, dense, naive."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from oracles.window import Call, Layer, running_mean, statistics, with_ones

SIDES = ("left", "right")


def eye(d: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64)


# ----------------------------------------------------------------------------------- dense rules


def decayed(H: torch.Tensor, rule: str, gamma: float) -> torch.Tensor:
    """``B``: what an update does first, once, whatever the number of vectors."""
    return {
        "exact": H / gamma,
        "paper": gamma * H,
        "release": gamma * H + (1 - gamma) * eye(len(H)),
    }[rule]


def with_vector(B: torch.Tensor, v: torch.Tensor, rule: str, gamma: float) -> torch.Tensor:
    """One rank-1 term: inverses written as such; the paper's as printed, with its plus.

    Lines 7-8 of Algorithm 1 speak of ``H``, which is ``B / gamma`` here.
    """
    if rule == "paper":
        H = B / gamma
        growth = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * (v @ H @ v)))
        return gamma * H + growth * torch.outer(H @ v, H @ v)
    weight = 1 - gamma if rule == "exact" else 1.0
    return torch.linalg.inv(torch.linalg.inv(B) + weight * torch.outer(v, v))


def stabilized(H: torch.Tensor, epsilon: float | None, zeta: float) -> torch.Tensor:
    """Lines 5-6: towards the identity where the largest entry exceeds ``epsilon``."""
    if epsilon is None or H.abs().max() <= epsilon:
        return H
    return zeta * H + (1 - zeta) * eye(len(H))


def kept(H: torch.Tensor) -> torch.Tensor:
    """What the printed rule lets vanish stays at a millionth."""
    largest = H.abs().max()
    return H * (1e-6 / largest) if 0 < largest < 1e-6 else H


def dense_update(
    H: torch.Tensor,
    vectors: list[torch.Tensor],
    rule: str,
    gamma: float,
    epsilon: float | None = None,
    zeta: float = 1.0,
) -> tuple[torch.Tensor, int]:
    """The stabilizer, the decay and the vectors, each after another look of the stabilizer.

    Returns also how often that acted.
    """
    acted = 0
    for i, v in enumerate(vectors):
        calm = stabilized(H, epsilon, zeta)
        acted += calm is not H
        B = calm if i else kept(decayed(calm, rule, gamma))
        H = with_vector(B, v / math.sqrt(len(vectors)), rule, gamma)
    return H, acted


RULES = ("exact", "paper", "release")


@dataclass(kw_only=True)
class DenseLayer(Layer):
    """``L^-1`` and ``R^-1`` as explicit matrices."""

    rule: str
    momentum: float = 0.95
    vectors: int = 1
    epsilon: float | None = 10.0
    zeta: float = 0.4
    inverse: dict[str, torch.Tensor] = field(default_factory=dict)
    stabilizations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))

    def learn(self, calls: list[Call], number: int) -> None:
        found = statistics(calls, self.vectors, self.bias)
        for side, vectors in zip(SIDES, (found.g, found.a), strict=True):
            H = self.inverse.get(side, eye(len(vectors[0])))
            how = (self.rule, self.momentum, self.epsilon, self.zeta)
            self.inverse[side], acted = dense_update(H, vectors, *how)
            self.stabilizations[side] += acted

    def left(self) -> torch.Tensor:
        return self.inverse["left"]

    def right(self) -> torch.Tensor:
        return self.inverse["right"]


# ------------------------------------------------------------------------------------------ KFAC


def rows_of(calls: list[Call], bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of an update, ``a`` with its ones and ``g`` in the scale of section 2.1."""
    a = torch.cat([a.flatten(0, 1) for a, _ in calls])
    g = torch.cat([g.flatten(0, 1) for _, g in calls])
    return with_ones(a) if bias else a, len(g) * g


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """Mean of the rows' outer products, not centred."""
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def damped_inverses(
    L: torch.Tensor, R: torch.Tensor, damping: float, pi_correction: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(L + lambda I)^-1`` and ``(R + lambda I)^-1``, or with ``lambda`` split between them."""
    left = right = damping
    if pi_correction:
        pi = math.sqrt((R.trace() / len(R)) / (L.trace() / len(L)))
        left, right = math.sqrt(damping) / pi, math.sqrt(damping) * pi
    return (
        torch.linalg.inv(L + left * eye(len(L))),
        torch.linalg.inv(R + right * eye(len(R))),
    )


@dataclass(kw_only=True)
class KFACLayer(Layer):
    """Averages of full covariances; their inverses anew at every ``inverse_updates``-th update."""

    momentum: float = 0.95
    damping: float = 0.001
    inverse_updates: int = 1
    pi_correction: bool = False
    history: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    inverses: tuple[torch.Tensor, torch.Tensor] | None = None

    def learn(self, calls: list[Call], number: int) -> None:
        a, g = rows_of(calls, self.bias)
        self.history.append((covariance(g), covariance(a)))

    def refresh(self, number: int) -> None:
        if number % self.inverse_updates == 0:
            self.inverses = damped_inverses(*self.averages(), self.damping, self.pi_correction)

    @property
    def ready(self) -> bool:
        return self.inverses is not None

    def averages(self) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = zip(*self.history, strict=True)
        return running_mean(left, self.momentum), running_mean(right, self.momentum)

    def left(self) -> torch.Tensor:
        return self.inverses[0]

    def right(self) -> torch.Tensor:
        return self.inverses[1]


# ------------------------------------------------------------------------------------------- Eva


def eva_product(M: torch.Tensor, a: torch.Tensor, b: torch.Tensor, delta: float) -> torch.Tensor:
    """``(M - b^T M a / (|a|^2 |b|^2 + delta) b a^T) / delta``."""
    along = (b @ M @ a) / (a.square().sum() * b.square().sum() + delta)
    return (M - along * torch.outer(b, a)) / delta


def kronecker_solve(
    M: torch.Tensor, L: torch.Tensor, R: torch.Tensor, delta: float
) -> torch.Tensor:
    """``(L (x) R + delta I)^-1 vec(M)`` with the rows of ``M`` one after the other."""
    S = torch.kron(L, R) + delta * eye(M.numel())
    return torch.linalg.solve(S, M.flatten()).reshape(M.shape)


@dataclass(kw_only=True)
class EvaLayer(Layer):
    """The mean vectors' averages, and an explicit solve with their Kronecker product.

    ``closed`` takes the formula instead, where the solve would be too ill-conditioned.
    """

    momentum: float = 0.95
    damping: float = 0.03
    closed: bool = False
    vectors: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {s: [] for s in SIDES})

    def learn(self, calls: list[Call], number: int) -> None:
        found = statistics(calls, 1, self.bias)
        for side, (v,) in zip(SIDES, (found.g, found.a), strict=True):
            self.vectors[side].append(v)

    def average(self, side: str) -> torch.Tensor:
        return running_mean(self.vectors[side], self.momentum)

    def product(self, M: torch.Tensor) -> torch.Tensor:
        b, a = (self.average(side) for side in SIDES)
        if self.closed:
            return eva_product(M.double(), a, b, self.damping)
        return kronecker_solve(M.double(), torch.outer(b, b), torch.outer(a, a), self.damping)


# --------------------------------------------------------------------------------------- kl_clip


def kl_scale(layers: list[tuple[float, torch.Tensor, torch.Tensor]], kl_clip: float) -> float:
    """``nu = min(1, sqrt(kl_clip / |sum lr^2 <P, M>|))`` over ``(lr, P, M)`` of all layers."""
    total = abs(sum(lr**2 * (P * M).sum().item() for lr, P, M in layers))
    return min(1.0, math.sqrt(kl_clip / total)) if total else 1.0
