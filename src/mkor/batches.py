"""Layers of one shape, handled as one batch: their buffers, their state, their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mkor import linalg
from mkor.communication.sharding import Shard
from mkor.curvature.contract import BatchShape, Curvature, Inverting, Statistics
from mkor.gate import Site
from mkor.selection import Layer
from mkor.slots import Slots
from mkor.tray import META, Tray

__all__ = ["Batch", "fingerprint"]


class Batch:
    """Layers of one shape on one device.

    Args:
        layers: The layers.
        shape: Their common shape.
        curvature: Their kind of factor.
        slots: Where their sums lie.
        buffer: The flat buffer that these lie in.
        update: 0-dim tensor on the same device, the number of updates so far.
        shard: Which part of each is stored here; None for all of it.
        inverter: The process that inverts their covariances for others; None where each does.
        keeps: Whether this process keeps their inverses.

    Attributes:
        a: ``[B, k, d_in]``, sums of inputs, over all processes once they are read; a side that is
            not captured has no vectors. Covariances follow the ``k`` vectors.
        g: ``[B, k, d_out]``, sums of raw output gradients likewise.
        meta: ``[B, 3 + k]``, see :class:`mkor.gate.Site`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        shape: BatchShape,
        curvature: Curvature,
        slots: Slots,
        buffer: Tensor,
        update: Tensor,
        shard: Shard | None = None,
        inverter: int | None = None,
        keeps: bool = True,
    ) -> None:
        B = len(layers)
        self.layers = list(layers)
        self.shape = shape
        self.curvature = curvature
        self.slots = slots
        self.tick = update
        self.shard, self.inverter, self.keeps = shard, inverter, keeps
        self.a, self.g, self.meta = slots.views(buffer)
        self.tray = Tray(self.a, self.g, self.meta)
        self.sites = [
            Site(
                layer.kind,
                self.a[i],
                self.g[i],
                self.meta[i],
                update,
                sharded=shard is not None,
                index=i,
                tray=self.tray,
            )
            for i, layer in enumerate(layers)
        ]
        self.skipped = [False] * B
        self.watched = self.measured = False
        self.state = self._initial()
        self.seen = torch.zeros(B, dtype=torch.bool, device=shape.device)
        self.finite = torch.ones_like(self.seen)
        # 0-dim: whether any layer's statistics or gradients are not finite.
        self.bad = torch.zeros_like(self.seen.any())
        # Whether any layer was preconditioned in this step, and which.
        self.touched = False
        # Which layers had data in the last update.
        self.fed = torch.ones_like(self.seen)
        self.done = torch.zeros_like(self.seen)
        # Rows: norm of the raw and of the preconditioned gradient, their inner product.
        self.last = torch.zeros(3, B, dtype=shape.dtype, device=shape.device)
        # Rows: updates refused for non-finite statistics, gradients passed raw for the same reason.
        self.refused = torch.zeros(2, B, dtype=torch.int64, device=shape.device)

    def release(self) -> None:
        """Free the factors of layers that are left to the base; keys and shapes stay."""
        self.state = {
            key: tensor.new_zeros(()).expand(tensor.shape)
            if tensor.dim() > 1 and key != "norms"
            else tensor
            for key, tensor in self.state.items()
        }

    def reset(self) -> None:
        """Start the factors anew, released ones too; what is known of the outputs stays."""
        output = self.state["output"]
        self.state = self._initial()
        self.state["output"].copy_(output)

    def _initial(self) -> dict[str, Tensor]:
        B, shape = len(self.layers), self.shape
        norms = torch.zeros(B, 2, dtype=shape.dtype, device=shape.device)
        output = torch.full((B,), -1, dtype=torch.int8, device=shape.device)
        state = self.curvature.init(shape)
        if not self.keeps and isinstance(self.curvature, Inverting):
            state = self.curvature.without_inverses(state)
        return {**state, "norms": norms, "output": output}

    def fingerprint(self) -> Tensor:
        """A number that other factors would not have; inverses that follow from them apart.

        Returns:
            0-dim float64.
        """
        left_out: set[int] = set()
        if isinstance(self.curvature, Inverting):
            inverses, notes = self.curvature.shared(self.state)
            left_out = {id(tensor) for tensor in (*inverses, *notes)}
        kept = [tensor for tensor in self.state.values() if id(tensor) not in left_out]
        return torch.stack([tensor.sum(dtype=torch.float64) for tensor in kept]).sum()

    def recover(self) -> None:
        """After loading, make anew what the process that saved it had left to others."""
        if self.keeps and isinstance(self.curvature, Inverting):
            self.curvature.recover(self.state)

    def read(self, totals: Sequence[Tensor]) -> None:
        """Take the sums of all processes.

        Args:
            totals: ``[P, n]`` for each flat buffer; with one set the buffer itself, where the
                views of construction see it.
        """
        if len(totals[self.slots.buffer]) > 1:
            self.a, self.g, self.meta = self.slots.joined(totals)

    def check(self) -> None:
        """See which layers have data, and whether statistics and gradients are finite."""
        squares_a, squares_g, rows = self.meta[:, :META].unbind(1)
        self.seen = rows > 0
        # None is negative, and NaN is not below infinity.
        self.finite = squares_a + squares_g + self.last[0] < math.inf
        self.bad = ~self.finite.all()

    def update(self, refuse: Tensor, scale: float | Tensor, number: int) -> None:
        """Give this step's statistics to the curvature.

        Args:
            refuse: 0-dim, whether the step's batch is bad and nothing is learned from it.
            scale: What raw ``g`` is multiplied with beside the number of rows.
            number: Updates of the optimizer before this one.
        """
        if all(self.skipped):
            return
        self.fed = self.seen
        accept = self.seen & ~refuse
        statistics = self._statistics(accept, refuse, scale, number)
        self.curvature.update(self.state, statistics)
        if not statistics.whole:
            self.refused[0] += self.seen & refuse

    def _statistics(
        self, accept: Tensor, refuse: Tensor, scale: float | Tensor, number: int
    ) -> Statistics:
        counts = self.meta[:, META:]
        squares_a, squares_g, total = self.meta[:, :META].unbind(1)
        rows, used = counts.clamp(min=1), counts.sum(1).clamp_(min=1)
        g_scale = total * scale
        k = counts.shape[1]
        vectors, mean_square, covariance = {}, {}, {}
        if "left" in self.shape.sides:
            vectors["left"] = self.g[:, :k] * (g_scale.unsqueeze(1) / rows).unsqueeze(-1)
            mean_square["left"] = squares_g * g_scale.square() / (used * self.shape.d_out)
            if self.curvature.covariance:
                covariance["left"] = self.g[:, k:] * (g_scale.square() / used).view(-1, 1, 1)
        if "right" in self.shape.sides:
            vectors["right"] = self.a[:, :k] / rows.unsqueeze(-1)
            ones = used if self.shape.bias else 0.0
            mean_square["right"] = (squares_a + ones) / (used * self.shape.full_width("right"))
            if self.curvature.covariance:
                second = self.a[:, k:] / used.view(-1, 1, 1)
                bias = self.shape.bias
                covariance["right"] = _with_ones(second, vectors["right"]) if bias else second
        filled = counts > 0
        whole = linalg.all_hold(accept, filled)
        return Statistics(vectors, mean_square, filled, accept, number, refuse, covariance, whole)

    def figures(self) -> dict[str, dict[str, float]]:
        """Figures of the last step, by layer; synchronises the device.

        Returns:
            For each layer that is preconditioned, names and numbers.
        """
        measured, self.watched = self.measured, True
        raw, norm, product = self.last.tolist()
        refused = self.refused.tolist()
        extra = {k: v.tolist() for k, v in self.curvature.figures(self.state, self.shape).items()}
        return {
            layer.name: {
                **({"cosine": _cosine(product[i], raw[i], norm[i])} if measured else {}),
                "norm_ratio": norm[i] / raw[i] if raw[i] else 1.0,
                "refused_updates": float(refused[0][i]),
                "raw_gradients": float(refused[1][i]),
                **{key: values[i] for key, values in extra.items()},
            }
            for i, layer in enumerate(self.layers)
            if not self.skipped[i]
        }


def fingerprint(batches: Sequence[Batch], updates: int) -> str:
    """What distinguishes the factors of one checkpoint from another's.

    Args:
        batches: The layers.
        updates: Of the factors, so far.

    Returns:
        For reading and comparing.
    """
    if not updates:
        return "of a new optimizer"
    sums = [batch.fingerprint().item() for batch in batches]
    # Threads add in different orders.
    return f"with the checksum {sum(sums):.6e}"


def _cosine(product: float, norm: float, norm2: float) -> float:
    return product / (norm * norm2) if norm * norm2 else 1.0


def _with_ones(second: Tensor, mean: Tensor) -> Tensor:
    """The covariance of ``[a 1]`` from that of ``a`` and the mean ``[B, 1, d]``."""
    full = torch.cat([second, mean], dim=1)
    return torch.cat([full, linalg.append_ones(mean).mT], dim=2)
