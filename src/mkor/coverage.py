"""What is preconditioned in a model, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mkor.selection import Layer, Selection, cleaner
from mkor.step.batches import Batch

__all__ = ["Coverage", "CoverageRow", "report"]


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Attributes:
        parameter: Its name in the model.
        shape: Its shape.
        preconditioned: Whether its gradient is preconditioned.
        reason: Why not; or what there is to know about a parameter that is.
        rank: Vectors kept per side; 0 if it is not preconditioned. A bias shares its weight's.
        state_bytes: Memory of the layer's factors, counted at its weight.
        flops: Floating-point operations a step of preconditioning, counted at its weight.
    """

    parameter: str
    shape: tuple[int, ...]
    preconditioned: bool
    reason: str
    rank: int = 0
    state_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Coverage:
    """All parameters of a model, in its order. Iterates over its rows and prints as a table."""

    rows: tuple[CoverageRow, ...]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def share(self) -> float:
        """Share of the parameters' entries that are preconditioned, from 0 to 1."""
        sizes = [(_size(row.shape), row.preconditioned) for row in self.rows]
        total = sum(size for size, _ in sizes)
        return sum(size for size, covered in sizes if covered) / total if total else 0.0

    @property
    def state_bytes(self) -> int:
        """Memory of all factors."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("parameter", "shape", "rank", "memory", "Mflop", "preconditioned")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        memory = _memory(self.state_bytes)
        return f"{table}\n{self.share:.1%} of the weights are preconditioned; factors take {memory}"


def report(
    model: nn.Module,
    selection: Selection,
    batches: Iterable[Batch],
    searching: bool,
    groups: Sequence[dict[str, object]],
    ended: str,
) -> Coverage:
    """Gather the rows.

    Args:
        model: The wrapped model.
        selection: What was chosen in it.
        batches: The preconditioned layers.
        searching: Whether the output layers are still to be found.
        groups: The base's parameter groups.
        ended: Why layers that could be preconditioned are not, once there are no batches.

    Returns:
        The coverage.
    """
    optimized = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    layers = {id(layer.weight): layer for layer in selection.layers}
    layers |= {id(layer.bias): layer for layer in selection.layers if layer.bias is not None}
    places = {id(layer): (batch, i) for batch in batches for i, layer in enumerate(batch.layers)}
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    clean = cleaner(model)
    rows = []
    for full_name, parameter in model.named_parameters():
        name = clean(full_name)
        layer = layers.get(id(parameter))
        place = places.get(id(layer))
        reason = _reason(parameter, layer, selection, owners[id(parameter)], optimized)
        if reason or place is None:
            reason = reason or ended
            rows.append(CoverageRow(name, tuple(parameter.shape), False, reason))
            continue
        rows.append(_covered(name, parameter, *place, searching))
    return Coverage(tuple(rows))


def _reason(
    parameter: Tensor,
    layer: Layer | None,
    selection: Selection,
    owner: nn.Module,
    optimized: set[int],
) -> str:
    if id(parameter) not in optimized:
        return "not among the base optimizer's parameters"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    if layer is not None:
        return layer.reason
    return selection.reasons.get(
        id(parameter), f"{type(owner).__name__} is not a supported kind of layer"
    )


def _covered(name: str, parameter: Tensor, batch: Batch, i: int, searching: bool) -> CoverageRow:
    layer, shape = batch.layers[i], tuple(parameter.shape)
    if batch.skipped[i]:
        return CoverageRow(name, shape, False, "output layer, left to the base (skip_output)")
    note = "unless it proves to be the output layer" if searching else ""
    if not searching and int(batch.state["updates"][i]) == 0:
        note = "no data seen so far"
    elif not searching and not batch.fed[i]:
        note = "no data in the last update"
    rank = batch.curvature.kept(batch.shape)
    if parameter is not layer.weight:
        return CoverageRow(name, shape, True, note, rank)
    size = sum(t[i].numel() * t.element_size() for t in batch.state.values())
    return CoverageRow(name, shape, True, note, rank, size, batch.curvature.cost(batch.shape))


def _cells(row: CoverageRow) -> tuple[str, ...]:
    verdict = ("yes" if row.preconditioned else "no") + (f": {row.reason}" if row.reason else "")
    shape = "x".join(map(str, row.shape))
    if not row.preconditioned:
        return row.parameter, shape, "", "", "", verdict
    if not row.state_bytes:
        return row.parameter, shape, str(row.rank), "", "", verdict
    cost = f"{row.flops / 1e6:,.1f}"
    return row.parameter, shape, str(row.rank), _memory(row.state_bytes), cost, verdict


def _memory(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
