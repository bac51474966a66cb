"""Inverting what takes long to invert: each layer on one process, for the others (KAISA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mkor.communication.assignment import Assignment
from mkor.communication.communicator import Communicator
from mkor.curvature.contract import Curvature, Inverting
from mkor.selection import Layer
from mkor.step.batches import Batch

__all__ = ["assignment_for", "inverters", "renew"]


def assignment_for(curvature: Curvature, communicator: Communicator) -> Assignment | None:
    """Who inverts and preconditions which layers.

    Args:
        curvature: The kind of factor.
        communicator: The processes.

    Returns:
        An assignment; None where every process does everything, since it is cheap or alone.

    Raises:
        ValueError: The curvature's fraction does not fit the number of processes.
    """
    if communicator.world_size == 1 or not isinstance(curvature, Inverting):
        return None
    return Assignment(communicator, curvature.grad_worker_fraction)


def inverters(
    layers: Sequence[Layer], assignment: Assignment | None
) -> Callable[[Layer], int | None]:
    """Assign layers to processes by what their inverses cost, ``d_out^3 + d_in^3``.

    Args:
        layers: The preconditioned layers.
        assignment: Of work to processes; None where each process does everything.

    Returns:
        The process that inverts a layer's covariances; None where each does.
    """
    if assignment is None:
        return lambda _: None
    costs = [
        float(layer.kind.d_out**3 + (layer.kind.d_in + layer.has_bias) ** 3) for layer in layers
    ]
    ranks = {
        layer.name: rank for layer, rank in zip(layers, assignment.inverters(costs), strict=True)
    }
    return lambda layer: ranks[layer.name]


def renew(
    batches: Sequence[Batch], curvature: Inverting, refuse: Tensor, assignment: Assignment | None
) -> None:
    """Invert the averages, each process those of its layers, and hand the inverses out.

    Args:
        batches: The layers.
        curvature: Their kind of factor.
        refuse: 0-dim, whether the step's batch is bad: then old inverses stay.
        assignment: Of layers to processes; None where each process inverts all.
    """
    used = [batch for batch in batches if not all(batch.skipped)]
    for batch in used:
        if assignment is None or assignment.inverts(batch.inverter or 0):
            # Layers without data in just this step have older averages, but good ones.
            known = batch.state["updates"] > 0
            curvature.renew(batch.state, known & ~refuse.to(known.device))
    if assignment is None:
        return
    shared = [(batch.inverter or 0, curvature.shared(batch.state)) for batch in used]
    assignment.share_inverses([(rank, inverses) for rank, (inverses, _) in shared])
    assignment.share_notes([(rank, notes) for rank, (_, notes) in shared])
