"""Layers of one shape, handled as one batch: their buffers, their state, their step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mkor import linalg
from mkor.capture import META, Site
from mkor.curvature.contract import BatchShape, Curvature, Statistics
from mkor.selection import Layer

__all__ = ["Batch"]

STACK_BELOW = 1 << 16
"""Weights with fewer entries share one batched product; larger ones would only be copied for it."""


@dataclass
class _Gradients:
    """The gradients of some layers of a batch, and which layers these are."""

    where: slice
    layers: list[Layer]
    W: Tensor
    b: Tensor | None


class Batch:
    """Layers of one shape on one device.

    Args:
        layers: The layers.
        shape: Their common shape.
        curvature: Their kind of factor.
        sums: ``a [B, k, d_in]``, ``g [B, k, d_out]`` and ``meta [B, 3 + k]``, views into the flat
            buffer; a side that is not used has width 0. Covariances follow the ``k`` vectors.
        update: 0-dim tensor on the same device, the number of updates so far.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        shape: BatchShape,
        curvature: Curvature,
        sums: tuple[Tensor, Tensor, Tensor],
        update: Tensor,
    ) -> None:
        B = len(layers)
        self.layers = list(layers)
        self.shape = shape
        self.curvature = curvature
        self.tick = update
        self.a, self.g, self.meta = sums
        self.sites = [
            Site(layer.kind, self.a[i], self.g[i], self.meta[i], update)
            for i, layer in enumerate(layers)
        ]
        self.skipped = [False] * B
        self.watched = self.measured = False
        self.state = self._initial()
        self.seen = torch.zeros(B, dtype=torch.bool, device=shape.device)
        self.finite = torch.ones_like(self.seen)
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

    def restore(self) -> None:
        """Make released factors writable again, empty."""
        self.state = {key: tensor.contiguous() for key, tensor in self.state.items()}

    def reset(self) -> None:
        """Start the factors anew, released ones too; what is known of the outputs stays."""
        output = self.state["output"]
        self.state = self._initial()
        self.state["output"].copy_(output)

    def _initial(self) -> dict[str, Tensor]:
        B, shape = len(self.layers), self.shape
        norms = torch.zeros(B, 2, dtype=shape.dtype, device=shape.device)
        output = torch.full((B,), -1, dtype=torch.int8, device=shape.device)
        return {**self.curvature.init(shape), "norms": norms, "output": output}

    def measure(self) -> Tensor:
        """Norms of the raw gradients, and whether this step's statistics and gradients are finite.

        Returns:
            Whether any layer's are not, a 0-dim tensor.
        """
        pairs = [
            (None, None) if skipped else layer.gradients
            for layer, skipped in zip(self.layers, self.skipped, strict=True)
        ]
        raw = torch.hypot(self._norms([W for W, _ in pairs]), self._norms([b for _, b in pairs]))
        self.last[0] = raw
        self.seen = self.meta[:, META:].sum(1) > 0
        self.finite = (self.meta[:, :2].sum(1) + raw).isfinite()
        return ~self.finite.all()

    def _norms(self, gradients: list[Tensor | None]) -> Tensor:
        present = [gradient for gradient in gradients if gradient is not None]
        zero = self.last.new_zeros(())
        norms = iter(torch._foreach_norm(present, 2, zero.dtype) if present else ())
        return torch.stack([zero if g is None else next(norms) for g in gradients])

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
        self.curvature.update(self.state, self._statistics(accept, refuse, scale, number))
        self.refused[0] += self.seen & refuse

    def _statistics(
        self, accept: Tensor, refuse: Tensor, scale: float | Tensor, number: int
    ) -> Statistics:
        counts = self.meta[:, META:]
        rows = counts.clamp(min=1).unsqueeze(-1)
        used = counts.sum(1).clamp(min=1)
        g_scale = self.meta[:, 2] * scale
        k = counts.shape[1]
        vectors, mean_square, covariance = {}, {}, {}
        if "left" in self.shape.sides:
            vectors["left"] = self.g[:, :k] * g_scale.view(-1, 1, 1) / rows
            mean_square["left"] = self.meta[:, 1] * g_scale.square() / (used * self.shape.d_out)
            if self.curvature.covariance:
                covariance["left"] = self.g[:, k:] * (g_scale.square() / used).view(-1, 1, 1)
        if "right" in self.shape.sides:
            vectors["right"] = self.a[:, :k] / rows
            width = self.shape.full_width("right")
            ones = used if self.shape.bias else 0.0
            mean_square["right"] = (self.meta[:, 0] + ones) / (used * width)
            if self.curvature.covariance:
                second = self.a[:, k:] / used.view(-1, 1, 1)
                bias = self.shape.bias
                covariance["right"] = _with_ones(second, vectors["right"]) if bias else second
        return Statistics(vectors, mean_square, counts > 0, accept, number, refuse, covariance)

    def precondition(self, due: bool, rescale: str | None, compare: bool = False) -> None:
        """Replace the layers' gradients by ``L^-1 M R^-1``, rescaled, in place.

        Args:
            due: Whether this step has statistics of its own; layers without any pass through then.
            rescale: ``"running"``, ``"step"`` or None.
            compare: Whether the inner products of raw and preconditioned gradients are needed.
        """
        use = self.state["updates"] > 0
        if due:
            use = use & self.seen & self.finite
        ready = self._ready()
        self.touched = bool(ready)
        self.done = torch.zeros_like(self.seen)
        if not ready:
            return
        first, beyond = ready[0], ready[-1] + 1
        spanned = {key: tensor[first:beyond] for key, tensor in self.state.items()}
        prepared = self.curvature.prepare(spanned, self.shape)
        ok = use & self.last[0].isfinite()
        self.measured = self.watched
        for part in self._gradients(ready):
            here = part.where
            spot = slice(here.start - first, here.stop - first)
            rows = {key: tensor[spot] for key, tensor in prepared.items()}
            P, p = part.W, part.b
            keep = self.watched or compare
            M = (P.clone(), None if p is None else p.clone()) if keep else None
            done = self.curvature.apply(rows, P, p, ok[here])
            raw, norm = self.last[0, here], linalg.joint_norm(P, p)
            self.last[1, here] = norm
            if M is not None:
                self.last[2, here] = linalg.inner(*M, P, p)
            self.done[here] = done
            self.refused[1, here] += use[here] & ~done
            ratio = self._ratio(here, raw, norm, done, rescale).unbind()
            for i, layer in enumerate(part.layers):
                W, b = layer.gradients
                assert W is not None
                _write(W, P[i], ratio[i])
                if p is not None and b is not None:
                    _write(b, p[i], ratio[i])

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients that were just preconditioned; the others stay as they are.

        Args:
            factor: 0-dim.
        """
        factors = torch.where(self.done, factor, 1.0).unbind()
        ready = self._ready()
        for place in (0, 1):
            pairs = [(self.layers[i].gradients[place], factors[i]) for i in ready]
            found = [(gradient, by) for gradient, by in pairs if gradient is not None]
            if found:
                torch._foreach_mul_([g for g, _ in found], [by.to(g.dtype) for g, by in found])

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

    def _ratio(
        self, where: slice, raw: Tensor, norm: Tensor, keep: Tensor, rescale: str | None
    ) -> Tensor:
        norms = self.state["norms"]
        old = norms[where]
        moved = linalg.momentum_average(old, torch.stack((raw, norm), 1), self.curvature.momentum)
        moved = torch.where(keep.unsqueeze(1), moved, old)
        norms[where] = moved
        if rescale is None:
            return torch.ones_like(raw)
        if rescale == "running":
            raw, norm = moved.unbind(1)
        return torch.where(keep, linalg.norm_ratio(raw, norm), 1.0)

    def _ready(self) -> list[int]:
        """The layers that are preconditioned and have a gradient."""
        return [
            i
            for i, layer in enumerate(self.layers)
            if not self.skipped[i] and layer.gradients[0] is not None
        ]

    def _gradients(self, ready: list[int]) -> Iterator[_Gradients]:
        small = self.shape.d_out * self.shape.d_in < STACK_BELOW
        for run in _runs(ready) if small else [[i] for i in ready]:
            layers = [self.layers[i] for i in run]
            weights, biases = zip(*(layer.gradients for layer in layers), strict=True)
            size = (self.shape.d_out, self.shape.d_in)
            b = None if all(bias is None for bias in biases) else self._stack(biases, size[:1])
            yield _Gradients(slice(run[0], run[-1] + 1), layers, self._stack(weights, size), b)

    def _stack(self, gradients: Sequence[Tensor | None], size: tuple[int, ...]) -> Tensor:
        rows = [
            self.last.new_zeros(size) if g is None else g.reshape(size).to(self.last.dtype)
            for g in gradients
        ]
        return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _cosine(product: float, norm: float, norm2: float) -> float:
    return product / (norm * norm2) if norm * norm2 else 1.0


def _runs(places: list[int]) -> list[list[int]]:
    """Neighbouring places together: a slice is a view, a list of places a copy."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] + 1 == place:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _with_ones(second: Tensor, mean: Tensor) -> Tensor:
    """The covariance of ``[a 1]`` from that of ``a`` and the mean ``[B, 1, d]``."""
    full = torch.cat([second, mean], dim=1)
    return torch.cat([full, linalg.append_ones(mean).mT], dim=2)


def _write(gradient: Tensor, new: Tensor, ratio: Tensor) -> None:
    new = new.view(gradient.shape)
    if new.dtype == gradient.dtype:
        torch.mul(new, ratio, out=gradient)
    else:
        gradient.copy_(new.mul_(ratio))
