"""Preconditioning: from the layers' gradients to ``L^-1 M R^-1``, rescaled or clipped, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mkor import linalg
from mkor.curvature.base import Curvature, State
from mkor.distributed.communicator import Communicator
from mkor.distributed.fsdp import Shard, sum_over_shards
from mkor.distributed.kaisa import Assignment
from mkor.layers.layer import local
from mkor.step.groups import Chunk, LayerGroup, chunks
from mkor.step.table import LayerTable, Rescaling

TOGETHER = 1 << 24
"""Entries of sharded gradients that wait for a common sum at most, unless one chunk has more."""

Gradients = Mapping[LayerGroup, Sequence[tuple["Tensor | None", "Tensor | None"]]]


@dataclass
class _Work:
    """A chunk and what it is preconditioned with.

    Attributes:
        chunk: The gradients.
        prepared: What the curvature needs, for these layers.
        use: ``[b]``, which have factors to use in this step.
        ok: ``[b]``, which gradients are to be preconditioned: these are finite as well.
        done: ``[b]``, which were.
    """

    chunk: Chunk
    prepared: State
    use: Tensor
    ok: Tensor
    done: Tensor = field(init=False)


def precondition(
    tables: Sequence[LayerTable],
    gradients: Gradients,
    curvature: Curvature,
    rescaling: Rescaling,
    *,
    due: bool,
    compare: bool,
    assignment: Assignment | None,
) -> None:
    """Replace the gradients by ``L^-1 M R^-1``, rescaled.

    ``due`` says whether the step has statistics of its own, ``compare`` whether inner products with
    the raw gradients are needed. With an assignment, some processes precondition for others.
    """
    for table in tables:
        table.done.zero_()
    shares = assignment is not None and assignment.shares_gradients
    for works in _rounds(_works(tables, gradients, curvature, due), shares):
        for work in works:
            work.chunk.load()
            if compare or work.chunk.group.watched:
                work.chunk.raw = work.chunk.M.clone()
        sharded = [(w, w.chunk.group.shard) for w in works]
        products = iter(_products([(w, shard) for w, shard in sharded if shard], curvature))
        for work, shard in sharded:
            prepared, M, group = work.prepared, work.chunk.M, work.chunk.group
            if shard is not None:
                how = (work.ok, shard.block, group.shape)
                work.done = curvature.apply_shard(prepared, M, next(products), *how)
            elif assignment is None or assignment.preconditions(group.inverter):
                work.done = curvature.apply(prepared, M, work.ok)
            else:
                work.done = torch.zeros_like(work.ok)
            # Nothing else holds what was prepared, which is as large as the factors.
            work.prepared = {}
        if assignment is not None and shares:
            _share(works, assignment)
        _finish(works, rescaling)


def _works(
    tables: Sequence[LayerTable], gradients: Gradients, curvature: Curvature, due: bool
) -> Iterator[_Work]:
    for table in tables:
        use, ok = table.usable(due)
        found = {group: list(chunks(group, pairs)) for group, pairs in gradients.items()}
        groups = [group for group in found if group.table is table and found[group]]
        each = curvature.prepare_all(table.factors, [group.index for group in groups])
        for group, prepared in zip(groups, each, strict=True):
            group.measured = group.watched
            for chunk in found[group]:
                whole = len(chunk.weights) == len(group.layers)
                mine = prepared if whole else {key: x[chunk.where] for key, x in prepared.items()}
                yield _Work(chunk, mine, use[chunk.here], ok[chunk.here])
                # From here on only the work holds it, which lets it go.
                del mine
            del prepared


def _rounds(works: Iterable[_Work], shares: bool) -> Iterator[list[_Work]]:
    """Work whose exchanges between processes are one: else each chunk by itself."""
    waiting: list[_Work] = []
    size = 0
    for work in works:
        group = work.chunk.group
        if group.shard is None and not shares:
            yield [work]
            continue
        waiting.append(work)
        size += len(work.chunk.weights) * group.shape.d_out * group.shape.columns
        if size >= TOGETHER and not shares:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _products(sharded: Sequence[tuple[_Work, Shard]], curvature: Curvature) -> list[Tensor]:
    """What the curvature needs of all blocks."""
    return sum_over_shards(
        [
            (
                shard,
                curvature.shard_products(w.prepared, w.chunk.M, shard.block, w.chunk.group.shape),
            )
            for w, shard in sharded
        ]
    )


def _share(works: Sequence[_Work], assignment: Assignment) -> None:
    """Give every process what the gradient workers of its row have preconditioned."""
    sent = [work.chunk.M.contiguous() for work in works]
    pairs = zip(works, sent, strict=True)
    assignment.share_gradients((w.chunk.group.inverter, [M, w.done]) for w, M in pairs)
    for work, M in zip(works, sent, strict=True):
        if M is not work.chunk.M:
            work.chunk.M.copy_(M)


def _finish(works: Sequence[_Work], rescaling: Rescaling) -> None:
    """Rescale, write the gradients, and keep the figures."""
    norms = [work.chunk.norm() for work in works]
    inner = [None if w.chunk.raw is None else linalg.inner(w.chunk.raw, w.chunk.M) for w in works]
    for work in works:
        work.chunk.raw = None
    if any(work.chunk.group.shard for work in works):
        norms, inner = _summed(works, norms, inner)
    for work, norm, product in zip(works, norms, inner, strict=True):
        table = work.chunk.group.table
        rows = table.rows(work.chunk.here)
        if product is not None:
            rows.inner.copy_(product)
        work.chunk.store(table.conclude(rows, norm, work.done, work.use, rescaling))


def _summed(
    works: Sequence[_Work], norms: Sequence[Tensor], inner: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Norms and inner products over all blocks, in one collective."""
    pairs = []
    for work, norm, product in zip(works, norms, inner, strict=True):
        # Squares of large numbers leave the range of float32.
        square = norm.double().square()
        both = torch.stack(
            (square, torch.zeros_like(square) if product is None else product.double())
        )
        shard = work.chunk.group.shard
        assert shard is not None
        pairs.append((shard, both))
    sums = sum_over_shards(pairs)
    return (
        [total[0].sqrt().to(norm.dtype) for total, norm in zip(sums, norms, strict=True)],
        [None if p is None else t[1].to(p.dtype) for t, p in zip(sums, inner, strict=True)],
    )


def clip_kl(
    tables: Sequence[LayerTable],
    gradients: Gradients,
    groups: Sequence[dict[str, Any]],
    limit: float,
) -> None:
    """Multiply all preconditioned gradients by ``nu = min(1, sqrt(kappa / |sum lr^2 <P, M>|))``.

    KAISA's and Eva's stage in place of rescaling. The sum runs over the layers that were
    preconditioned in this step, each with the learning rate of its weight's group of the base.
    """
    if not tables:
        return
    owners = {id(p): group for group in groups for p in group["params"]}
    products = []
    for table in tables:
        layers = [layer for g in gradients if g.table is table for layer in g.layers]
        lr = _rates([owners[id(layer.weight)] for layer in layers], table.last)
        products.append(torch.where(table.done, lr.square() * table.last[2], 0.0).sum())
    total = torch.stack([product.to(products[0]) for product in products]).sum()
    nu = linalg.kl_scale(total, limit)
    for table in tables:
        factors = torch.where(table.done, nu.to(table.last), 1.0).unbind()
        scaled = [
            (gradient, factors[group.span.start + i])
            for group, pairs in gradients.items()
            if group.table is table
            for i, pair in enumerate(pairs)
            for gradient in pair
            if gradient is not None
        ]
        for dtype in dict.fromkeys(gradient.dtype for gradient, _ in scaled):
            found = [(gradient, by) for gradient, by in scaled if gradient.dtype == dtype]
            torch._foreach_mul_([g for g, _ in found], [by.to(dtype) for _, by in found])


def _rates(groups: Iterable[dict[str, Any]], like: Tensor) -> Tensor:
    """``[N]``, the learning rate of each layer's group; numbers are no copies from the host."""
    runs = [list(run) for _, run in groupby(groups, key=id)]
    return torch.cat([like.new_ones(len(run)) * _rate(run[0], like) for run in runs])


def _rate(group: dict[str, Any], like: Tensor) -> float | Tensor:
    """As it can be multiplied with; a device takes numbers from the host without a copy."""
    rate: float | Tensor = group["lr"]
    return rate.to(like.device) if isinstance(rate, Tensor) and not rate.is_cpu else rate


def gradients_finite(parameters: Iterable[Tensor], communicator: Communicator) -> bool:
    """Whether every gradient is finite, here and where its other parts are stored.

    Asks each device once.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    blocks = [local(gradient) for gradient in gradients]
    finite = _finite(blocks)
    if all(block is gradient for block, gradient in zip(blocks, gradients, strict=True)):
        return finite
    return not communicator.sum_small(torch.tensor(float(not finite), device="cpu")).item()


def _finite(gradients: list[Tensor]) -> bool:
    present = [g._values() if g.is_sparse else g for g in gradients]
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in present:
        by_device.setdefault(gradient.device, []).append(gradient)
    return all(bool(_norms(group).isfinite().all()) for group in by_device.values())


def _norms(gradients: list[Tensor]) -> Tensor:
    """In at least float32: float16 overflows where its entries do not."""
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([n.to(dtype) for n in torch._foreach_norm(gradients, 2, dtype)])
