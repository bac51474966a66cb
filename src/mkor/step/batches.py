"""Layers of one shape, handled as one batch: their buffers, their state, their statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from mkor import linalg, native
from mkor.capture.site import Site
from mkor.capture.tray import Tray
from mkor.communication.sharding import Shard
from mkor.curvature.contract import BatchShape, Curvature, Inverting, Means, Statistics
from mkor.layers.sums import Pick
from mkor.selection import Layer
from mkor.step.roster import Counted, Roster
from mkor.step.slots import Slots

__all__ = ["Batch", "by_roster", "counts_of", "fingerprint"]


class Batch:
    """Layers of one shape on one device.

    Args:
        layers: The layers.
        shape: Their common shape.
        curvature: Their kind of factor.
        slots: Where their sums lie.
        buffer: The flat buffer that these lie in.
        roster: Where what is known of each layer is kept.
        span: Which of its layers these are.
        update: 0-dim tensor on the same device, the number of updates so far.
        shard: Which part of each is stored here; None for all of it.
        inverter: The process that inverts their covariances for others; None where each does.
        keeps: Whether this process keeps their inverses.

    Attributes:
        a: ``[B, k, d_in]``, sums of inputs, over all processes once they are read; a side that is
            not captured has no vectors. Covariances follow the ``k`` vectors.
        g: ``[B, k, d_out]``, sums of raw output gradients likewise.
        meta: ``[B, 3 + k]``, see :class:`mkor.capture.site.Site`.
        watched: Whether the inner products of raw and preconditioned gradients are to be measured.
        measured: Whether they were in the last step.
        last, seen, fed, done, refused: The layers' part of the roster's.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        shape: BatchShape,
        curvature: Curvature,
        slots: Slots,
        buffer: Tensor,
        roster: Roster,
        span: slice,
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
        # Layers of one kind share what says so, by which it is seen fastest.
        kinds = {layer.kind: layer.kind for layer in layers}
        self.sites = [
            Site(
                kinds[layer.kind],
                a,
                g,
                meta,
                update,
                sharded=shard is not None,
                index=i,
                tray=self.tray,
                places=None if curvature.covariance else native.addresses(a, g, meta),
            )
            for i, (layer, a, g, meta) in enumerate(
                zip(layers, self.a, self.g, self.meta, strict=True)
            )
        ]
        self.skipped = [False] * B
        self.watched = self.measured = False
        self.roster, self.span = roster, span
        self.last, self.refused = roster.last[:, span], roster.refused[:, span]
        self.seen, self.fed, self.done = roster.seen[span], roster.fed[span], roster.done[span]
        self.state = self._initial()

    def plan(self, pick: Pick) -> None:
        """Prepare for the passes of the next step.

        Args:
            pick: Which rows they use.
        """
        before = None
        for site in self.sites:
            before = site.begin(pick, before)

    def leave(self, skipped: Sequence[bool]) -> None:
        """Leave layers to the base.

        Args:
            skipped: Which; if all, their factors are freed.
        """
        self.skipped = list(skipped)
        self.roster.kept[self.span] = ~torch.tensor(self.skipped, device="cpu")
        if all(self.skipped):
            self.release()

    def release(self) -> None:
        """Free the factors of layers that are left to the base; keys and shapes stay."""
        self.state = {
            key: tensor.new_zeros(()).expand(tensor.shape)
            if tensor.dim() > 1 and key != "norms"
            else tensor
            for key, tensor in self.state.items()
        }

    def reset(self) -> None:
        """Start anew after the roster, released factors too; what is known of the outputs stays."""
        output = self.state["output"]
        self.state = self._initial()
        self.state["output"].copy_(output)

    def _initial(self) -> dict[str, Tensor]:
        B, shape = len(self.layers), self.shape
        norms, updates = self.roster.norms[self.span], self.roster.updates[self.span]
        output = torch.full((B,), -1, dtype=torch.int8, device=shape.device)
        state = self.curvature.init(shape)
        if not self.keeps and isinstance(self.curvature, Inverting):
            state = self.curvature.without_inverses(state)
        return {**state, "updates": updates, "norms": norms, "output": output}

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

    def statistics(self, counted: Counted, refuse: Tensor, number: int) -> Statistics:
        """This step's statistics.

        Args:
            counted: What follows from the layers' counts and squares.
            refuse: 0-dim, whether the step's batch is bad and nothing is learned from it.
            number: Updates of the optimizer before this one.

        Returns:
            What the curvature learns from.
        """
        sides, k = self.shape.sides, counted.filled.shape[1]
        sums = {side: self.g if side == "left" else self.a for side in sides}
        scales = {side: counted.g_means if side == "left" else counted.a_means for side in sides}
        if not self.curvature.covariance:
            vectors, covariance = Means(sums, scales), {}
        else:
            vectors = Means({side: both[:, :k] for side, both in sums.items()}, scales)
            covariance = self._covariances(counted, vectors)
        return Statistics(
            vectors,
            {side: getattr(counted, side) for side in sides},
            counted.filled,
            counted.accept,
            number,
            refuse,
            covariance,
            counted.whole,
        )

    def _covariances(self, counted: Counted, means: Means) -> dict[str, Tensor]:
        """Of both sides, from the sums that follow those of the vectors."""
        found, k = {}, counted.filled.shape[1]
        if "left" in means:
            scale = counted.g_scale.square() / counted.used
            found["left"] = self.g[:, k:] * scale.view(-1, 1, 1)
        if "right" in means:
            second = self.a[:, k:] / counted.used.view(-1, 1, 1)
            found["right"] = _with_ones(second, means["right"]) if self.shape.bias else second
        return found

    def figures(self, watch: bool = True) -> dict[str, dict[str, float]]:
        """Figures of the last step, by layer; synchronises the device.

        Args:
            watch: Whether cosines are to be measured from now on.

        Returns:
            For each layer that is preconditioned, names and numbers.
        """
        measured, self.watched = self.measured, self.watched or watch
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


def by_roster(batches: Sequence[Batch]) -> Iterator[tuple[Roster, list[Batch]]]:
    """Batches that share a roster, together.

    Args:
        batches: As they were allocated, those of one roster next to each other.

    Yields:
        Each roster with its batches, in order.
    """
    for roster, group in groupby(batches, key=attrgetter("roster")):
        yield roster, list(group)


def counts_of(batches: Sequence[Batch]) -> Tensor:
    """Counts and squares of all layers of a roster.

    Args:
        batches: All of its batches.

    Returns:
        ``[N, 3 + k]``.
    """
    return linalg.joined([batch.meta for batch in batches])


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
