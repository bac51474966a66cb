"""What must be the same with several processes as with one, and among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
NOTHING = "\0"


def assert_equal(
    found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, *, own: str = NOTHING
) -> None:
    """Weights after every step, factors, figures and decisions are those of one process.

    But for entries with ``own`` in their names.
    """
    tolerance = TOLERANCE[dtype]
    assert_factors_equal(found, expected, dtype, own=own)
    assert found["covered"] == expected["covered"]
    assert found["figures"] == pytest.approx(expected["figures"], rel=100 * tolerance, nan_ok=True)


def assert_effective(expected: dict[str, Any], moved: float = 0.03) -> None:
    """Preconditioning did something, or the comparison would prove little."""
    turned = expected["figures"].get("mkor/mean_cosine", 0.0)
    assert turned < 0.995
    assert (expected["weights"][-1] - expected["weights"][0]).norm() > moved


def assert_factors_equal(
    found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, *, own: str = NOTHING
) -> None:
    """Weights after the last steps, factors and the switch are those of one process."""
    tolerance = TOLERANCE[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    last = expected["weights"][-len(found["weights"]) :]
    torch.testing.assert_close(found["weights"], last, **close)
    assert found["switched at"] == expected["switched at"]
    assert found["state"].keys() == expected["state"].keys()
    for key, tensor in expected["state"].items():
        if own in key:
            continue
        if "counters" in key:
            assert torch.equal(found["state"][key][:-1], tensor[:-1])
        else:
            scale = tensor.double().abs().max().item() if tensor.numel() else 0.0
            close = {"rtol": 0.0, "atol": 100 * tolerance * scale}
            torch.testing.assert_close(found["state"][key], tensor, **close, msg=f"{key} differs")


def assert_in_step(
    values: list[dict[str, Any]], *, own: str = NOTHING, figures: bool = True
) -> None:
    """Weights, factors, figures and decisions are bitwise the same on all processes.

    But for entries with ``own`` in their names.
    """
    first = values[0]
    assert first["covered"] or first["switched at"]
    for other in values[1:]:
        assert torch.equal(first["weights"].nan_to_num(), other["weights"].nan_to_num())
        assert first["state"].keys() == other["state"].keys()
        for key, tensor in first["state"].items():
            # The last counter is the process' own number of micro-batches.
            mine, theirs = tensor, other["state"][key]
            if "counters" in key:
                mine, theirs = mine[:-1], theirs[:-1]
            assert own in key or torch.equal(mine, theirs), key
        assert first["covered"] == other["covered"]
        if figures:
            assert first["figures"] == pytest.approx(other["figures"], rel=0, abs=0, nan_ok=True)
        assert first["switched at"] == other["switched at"]
    for key, tensor in first["state"].items():
        assert tensor.isfinite().all(), key
