"""Windows as ring buffers: the newest vectors come in over the oldest, the others lose weight.

State, per side: ``rows [B, r, d]`` (``v_i``), ``gram [B, r, r]`` (``V V^T``, without the ones of a
bias) and ``mean_square [B]``; for both sides ``weights [B, r]``, ``updates [B]`` and
``written [B]``; see :class:`mkor.curvature.window.Window`. An update costs ``2 k r d`` operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mkor import linalg, native
from mkor.curvature.contract import Means, Statistics
from mkor.memo import memo

__all__ = ["turn"]

State = dict[str, Tensor]


def turn(pairs: Sequence[tuple[State, Statistics]], momentum: float) -> None:
    """Write the new vectors of batches of several shapes; what is small is done for all at once.

    Args:
        pairs: Each batch's state, changed in place, and its statistics; all have as many slots.
        momentum: ``gamma``.
    """
    others = [pair for pair in pairs if not _turn_natively(*pair, momentum)]
    for whole in (True, False):
        alike = [pair for pair in others if pair[1].whole == whole]
        if alike:
            _turn_alike(alike, momentum, whole)


def _turn_natively(state: State, statistics: Statistics, momentum: float) -> bool:
    """One batch by a kernel, if it is of the kind that these serve."""
    filled, accept, means = statistics.filled, statistics.accept, statistics.vectors
    if not isinstance(means, Means):
        ones = torch.ones(filled.shape, device=filled.device)
        means = Means(means, dict.fromkeys(means, ones))
    sides = [
        native.Side(
            sums,
            means.scales[side],
            statistics.mean_square[side],
            state[f"{side}_rows"],
            state[f"{side}_gram"],
            state[f"{side}_mean_square"],
        )
        for side, sums in means.sums.items()
    ]
    if not native.serves(state["weights"], *(tensor for side in sides for tensor in side)):
        return False
    native.update_window(state, filled.contiguous(), accept.contiguous(), momentum, sides)
    return True


def _turn_alike(pairs: Sequence[tuple[State, Statistics]], momentum: float, whole: bool) -> None:
    """Where all layers accept and all slots are filled, or where some may not."""
    states, figures = zip(*pairs, strict=True)
    sizes = tuple(len(state["updates"]) for state in states)
    rank = states[0]["weights"].shape[1]
    accept = None if whole else linalg.joined([each.accept for each in figures])
    filled = linalg.joined([each.filled for each in figures])
    places, new = _age(states, filled, accept, momentum)
    k = places.shape[1]
    numbers = (places + _first_rows(sizes, rank, places.device)).flatten()
    rows = linalg.cut(numbers, [k * size for size in sizes])
    news = (None,) * len(sizes) if new is None else linalg.cut(new, sizes)
    cuts = zip(pairs, linalg.cut(places, sizes), rows, news, strict=True)
    for (state, statistics), slots, lines, some in cuts:
        for side, vectors in statistics.vectors.items():
            _write(state, side, vectors, slots, lines, some)
    for side in figures[0].vectors:
        averages = [state[f"{side}_mean_square"] for state in states]
        average = linalg.joined(averages)
        square = linalg.joined([each.mean_square[side] for each in figures])
        moved = linalg.momentum_average(average, square, momentum)
        if accept is not None:
            moved = torch.where(accept, moved, average)
        torch._foreach_copy_(averages, linalg.cut(moved, sizes))


def _age(
    states: Sequence[State], filled: Tensor, accept: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor | None]:
    """Make room for new vectors: older ones lose weight, the oldest their places.

    Args:
        states: The windows, ``N`` in all, changed in place.
        filled: ``[N, k]``, where a vector comes.
        accept: ``[N]``, which layers take theirs; None if all do, and all slots are filled.
        momentum: ``gamma``.

    Returns:
        ``[N, k]``: where in its ring each slot goes, and whether a vector does; None for all.
    """
    keys = ("written", "weights", "updates")
    each = [[state[key] for state in states] for key in keys]
    written, weights, updates = (linalg.joined(tensors) for tensors in each)
    rank = weights.shape[1]
    slot = torch.arange(filled.shape[1], device=filled.device)
    if accept is None:
        new, k = None, filled.shape[1]
        places = (written.unsqueeze(1) + slot) % rank
        aged = (weights * momentum).scatter_(1, places, (1.0 - momentum) / k)
        moved = (written + k, aged, updates + 1)
    else:
        made = filled.sum(1)
        # Filled slots take the next places in order; the others write back what comes after.
        upto = filled.cumsum(1)
        order = torch.where(filled, upto - 1, made.unsqueeze(1) + slot - upto)
        places = (written.unsqueeze(1) + order) % rank
        new = filled & accept.unsqueeze(1)
        aged = torch.where(accept.unsqueeze(1), weights * momentum, weights)
        fresh = (1.0 - momentum) / made.clamp(min=1).to(aged.dtype).unsqueeze(1)
        fresh = torch.where(new, fresh, aged.gather(1, places))
        aged.scatter_(1, places, fresh)
        moved = (written + torch.where(accept, made, 0), aged, updates + accept)
    sizes = [len(state["updates"]) for state in states]
    for tensors, values in zip(each, moved, strict=True):
        torch._foreach_copy_(tensors, linalg.cut(values, sizes))
    return places, new


def _write(
    state: State, side: str, arrived: Tensor, places: Tensor, numbers: Tensor, new: Tensor | None
) -> None:
    """Put vectors into a side's ring, and their products into the Gram matrix.

    Args:
        state: The windows.
        side: ``"left"`` or ``"right"``.
        arrived: ``[B, k, d]``.
        places: ``[B, k]``, where they go.
        numbers: ``[B k]``, the same, counted through all rings.
        new: ``[B, k]``, at which places something is written; None for all.
    """
    ring, gram = state[f"{side}_rows"], state[f"{side}_gram"]
    scale = state.get(f"{side}_scale")
    if scale is not None:
        largest = arrived.abs().amax(-1)
        largest = torch.where(largest > 0, largest, 1.0)
        written = largest if new is None else largest.where(new, scale.gather(1, places))
        scale.scatter_(1, places, written)
        arrived = arrived / largest.unsqueeze(-1)
    arrived = arrived.to(ring.dtype)
    r = ring.shape[1]
    all_rows, all_products = ring.view(-1, ring.shape[2]), gram.view(-1, r)
    if new is not None:
        old = all_rows.index_select(0, numbers).view_as(arrived)
        arrived = torch.where(new.unsqueeze(-1), arrived, old)
    all_rows.index_copy_(0, numbers, arrived.flatten(0, 1))
    products = torch.bmm(arrived.to(gram.dtype), ring.to(gram.dtype).mT)
    if scale is not None:
        products = products * scale.unsqueeze(1) * scale.gather(1, places).unsqueeze(2)
    if new is not None:
        # Unchanged rows keep unchanged products, to the last bit.
        old = all_products.index_select(0, numbers).view_as(products)
        products = torch.where(new.any(1)[:, None, None], products, old)
    all_products.index_copy_(0, numbers, products.flatten(0, 1))
    gram.scatter_(2, places.unsqueeze(1).expand(-1, r, -1), products.mT)


@memo(maxsize=64)
def _first_rows(sizes: Sequence[int], rank: int, device: torch.device) -> Tensor:
    """``[N, 1]``: by number, whole rows of rings are copied much faster than single entries."""
    return torch.cat([rank * torch.arange(size, device=device) for size in sizes]).unsqueeze(1)
