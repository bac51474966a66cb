"""Figures of the last step, flat, as loggers take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from mkor.step.batches import Batch

__all__ = ["gather"]


def gather(
    batches: Iterable[Batch], counters: Mapping[str, int], refused: Tensor, *, watch: bool = True
) -> dict[str, float]:
    """Figures of all layers and their totals; synchronises the device.

    Args:
        batches: The preconditioned layers.
        counters: The optimizer's own, by name.
        refused: ``[2]`` on the CPU, refused updates and raw gradients of layers given up since.
        watch: Whether cosines are to be measured from now on.

    Returns:
        ``layer/figure`` for every layer, and ``mkor/...`` for totals.
    """
    figures: dict[str, float] = {}
    layers: list[dict[str, float]] = []
    for batch in batches:
        refused = refused + batch.refused.sum(1).cpu()
        for name, numbers in batch.figures(watch).items():
            layers.append(numbers)
            figures |= {f"{name}/{key}": value for key, value in numbers.items()}
    totals = {name: float(value) for name, value in counters.items()}
    totals["layers"] = float(len(layers))
    totals["refused_updates"], totals["raw_gradients"] = (float(n) for n in refused)
    cosines = [numbers["cosine"] for numbers in layers if "cosine" in numbers]
    if cosines:
        totals["mean_cosine"] = sum(cosines) / len(cosines)
    return figures | {f"mkor/{name}": value for name, value in totals.items()}
