"""What users see: which parameters are preconditioned and why the others are not; figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mkor.curvature.base import Curvature
from mkor.layers.layer import Layer
from mkor.layers.selection import Selection, cleaner
from mkor.step.groups import LayerGroup
from mkor.step.table import LayerTable


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
        sizes = [(math.prod(row.shape), row.preconditioned) for row in self.rows]
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


def coverage(
    model: nn.Module,
    selection: Selection,
    groups: Iterable[LayerGroup],
    curvature: Curvature,
    param_groups: Sequence[dict[str, Any]],
    *,
    searching: bool,
    ended: str,
) -> Coverage:
    """The coverage of a model.

    ``searching`` says whether the output layers are still to be found, ``ended`` why layers that
    could be preconditioned are not, once there are no groups.
    """
    optimized = {id(p) for group in param_groups for p in group["params"]}
    layers = {id(layer.weight): layer for layer in selection.layers}
    layers |= {id(layer.bias): layer for layer in selection.layers if layer.bias is not None}
    places = {id(layer): (group, i) for group in groups for i, layer in enumerate(group.layers)}
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
        rows.append(_covered(name, parameter, *place, curvature, searching))
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


def _covered(
    name: str, parameter: Tensor, group: LayerGroup, i: int, curvature: Curvature, searching: bool
) -> CoverageRow:
    layer, shape = group.layers[i], tuple(parameter.shape)
    if group.skipped[i]:
        return CoverageRow(name, shape, False, "output layer, left to the base (skip_output)")
    note = "unless it proves to be the output layer" if searching else ""
    if not searching and int(group.state["updates"][i]) == 0:
        note = "no data seen so far"
    elif not searching and not group.table.has_data[group.span][i]:
        note = "no data in the last update"
    rank, flops = curvature.describe(group.shape)
    if parameter is not layer.weight:
        return CoverageRow(name, shape, True, note, rank)
    size = sum(t[i].numel() * t.element_size() for t in group.state.values())
    return CoverageRow(name, shape, True, note, rank, size, flops)


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


def diagnostics(
    tables: Iterable[LayerTable],
    groups: Iterable[LayerGroup],
    curvature: Curvature,
    counters: Mapping[str, int],
    refused: Tensor,
    *,
    watch: bool,
) -> dict[str, float]:
    """``layer/figure`` for every layer, and ``mkor/...`` for totals; synchronises the device.

    ``refused`` ``[2]`` are refused updates and raw gradients of layers given up since; ``watch``
    says whether cosines are to be measured from now on.
    """
    figures: dict[str, float] = {}
    layers: list[dict[str, float]] = []
    for table in tables:
        refused = refused + table.refused.sum(1).cpu()
    for group in groups:
        for name, numbers in _figures(group, curvature, watch).items():
            layers.append(numbers)
            figures |= {f"{name}/{key}": value for key, value in numbers.items()}
    totals = {name: float(value) for name, value in counters.items()}
    totals["layers"] = float(len(layers))
    totals["refused_updates"], totals["raw_gradients"] = (float(n) for n in refused)
    cosines = [numbers["cosine"] for numbers in layers if "cosine" in numbers]
    if cosines:
        totals["mean_cosine"] = sum(cosines) / len(cosines)
    return figures | {f"mkor/{name}": value for name, value in totals.items()}


def _figures(group: LayerGroup, curvature: Curvature, watch: bool) -> dict[str, dict[str, float]]:
    """Figures of the last step, by layer that is preconditioned."""
    measured, group.watched = group.measured, group.watched or watch
    if group.is_left:
        return {}
    table, span = group.table, group.span
    raw, norm, product = table.last[:, span].tolist()
    refused = table.refused[:, span].tolist()
    extra = curvature.diagnostics(group.state, group.shape)
    listed = {key: values.tolist() for key, values in extra.items()}
    return {
        layer.name: {
            **({"cosine": _cosine(product[i], raw[i], norm[i])} if measured else {}),
            "norm_ratio": norm[i] / raw[i] if raw[i] else 1.0,
            "refused_updates": float(refused[0][i]),
            "raw_gradients": float(refused[1][i]),
            **{key: values[i] for key, values in listed.items()},
        }
        for i, layer in enumerate(group.layers)
        if not group.skipped[i]
    }


def _cosine(product: float, norm: float, norm2: float) -> float:
    return product / (norm * norm2) if norm * norm2 else 1.0
