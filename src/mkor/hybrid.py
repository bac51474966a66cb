"""MKOR-H: when the loss no longer falls fast, the base optimizer goes on alone.

The paper names the hybrid but publishes no rule. Ours compares the rate at which the smoothed loss
falls, in loss units per step, with the best rate it ever had. All lengths are shares of the steps
taken so far, so that the rule means the same in a run of a hundred steps and of a million.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from mkor._warn import warn
from mkor.distributed.communicator import Communicator

SILENCE = 10
"""Looks without a loss before a warning."""


@dataclass(frozen=True)
class LossRateSwitch:
    """When to hand over to the base optimizer for good; pass it as ``hybrid=``.

    Every ``every`` steps, the mean of the losses reported since enters two averages, each with a
    horizon that is a share of the looks so far: ``smoothing`` and twice that. Their difference over
    that of their mean ages is the rate. The switch is made when the rate has stayed below
    ``fraction`` of its best for a share ``patience`` of the looks so far. A loss that never falls
    after the warm-up has no best rate to compare with, and never switches.

    Attributes:
        fraction: Of the best rate, in (0, 1).
        smoothing: Share of the looks so far over which the loss is averaged, in (0, 1).
        patience: Share of the looks so far for which the rate must stay low, in [0, 1).
        warmup: Steps before which no switch is made and no rate counts as the best.
        every: Steps between looks, each of which synchronises the device once.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number has the wrong type.
    """

    fraction: float = 0.25
    smoothing: float = 0.1
    patience: float = 0.3
    warmup: int = 50
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("fraction", "smoothing", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < 1 or (value == 0 and name != "patience"):
                low = "at least 0" if name == "patience" else "above 0"
                raise ValueError(f"{name} must be {low} and below 1, got {value}")
        for name, least in (("warmup", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class LossRate:
    """What the rule remembers.

    Attributes:
        looks: Mean losses so far, ``n``.
        fast: Average with horizon ``h = max(1, smoothing * n)``, in loss units.
        slow: Average with horizon ``2 h``.
        fast_age: Mean age of what is in ``fast``, in looks.
        slow_age: Mean age of what is in ``slow``.
        best: The highest rate so far, in loss units per look; 0 before the first.
        low_since: The look from which on the rate has been low; 0 while it is not.
    """

    looks: float = 0.0
    fast: float = 0.0
    slow: float = 0.0
    fast_age: float = 0.0
    slow_age: float = 0.0
    best: float = 0.0
    low_since: float = 0.0

    def after(self, loss: float, step: int, settings: LossRateSwitch) -> LossRate:
        """Take one mean loss in."""
        n = self.looks + 1
        horizon = max(1.0, settings.smoothing * n)
        fast, fast_age = _average(self.fast, self.fast_age, loss, n, horizon)
        slow, slow_age = _average(self.slow, self.slow_age, loss, n, 2 * horizon)
        if n == 1 or step <= settings.warmup:
            return LossRate(n, fast, slow, fast_age, slow_age)
        rate = (slow - fast) / (slow_age - fast_age)
        best = max(self.best, rate)
        low_since = (self.low_since or n) if rate < settings.fraction * best else 0.0
        return LossRate(n, fast, slow, fast_age, slow_age, best, low_since)

    def ended(self, settings: LossRateSwitch) -> bool:
        """Whether it is time to switch."""
        return self.low_since > 0 and self.looks - self.low_since >= settings.patience * self.looks


def _average(
    average: float, age: float, loss: float, looks: float, horizon: float
) -> tuple[float, float]:
    """Move an average and the mean age of its terms; the first loss is taken whole."""
    weight = 1 / min(looks, horizon)
    return average + weight * (loss - average), (1 - weight) * (age + 1)


class Switch:
    """Gathers losses without asking the device, and decides the same on every process."""

    def __init__(self, settings: LossRateSwitch, device: torch.device) -> None:
        self.settings = settings
        # Sum and number of the losses since the last look.
        self._losses = torch.zeros(2, device=device)
        # The fields of LossRate, and the step of the switch or -1.
        fields = [*astuple(LossRate()), -1.0]
        self._record = torch.tensor(fields, dtype=torch.float64, device="cpu")
        self._silent = 0
        self._warned = False

    @property
    def entries(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {"losses": self._losses, "switch": self._record}

    @property
    def switched_at(self) -> int | None:
        """Steps taken when the switch was made; None before."""
        step = int(self._record[-1])
        return None if step < 0 else step

    def reset(self) -> None:
        """Begin anew, as at construction; in new tensors, since checkpoints may hold the old."""
        self._losses = torch.zeros_like(self._losses)
        fields = [*astuple(LossRate()), -1.0]
        self._record = torch.tensor(fields, dtype=torch.float64, device="cpu")
        self._silent = 0

    def ended_in(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether a checkpoint was written after the switch."""
        record = next((entry.get("mkor_switch") for entry in saved.values()), None)
        return record is not None and record.shape == self._record.shape and bool(record[-1] >= 0)

    def report(self, loss: float | Tensor) -> None:
        """Add a loss; one that is not finite does not count."""
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            value = loss.detach().reshape(()).to(self._losses, non_blocking=True)
            known = value.isfinite()
            self._losses += torch.stack((torch.where(known, value, 0.0), known.to(value)))
        elif isinstance(loss, int | float) and not isinstance(loss, bool):
            if math.isfinite(loss):
                self._losses[0] += loss
                self._losses[1] += 1
        else:
            raise TypeError(f"a loss is one number or a tensor with one, got {loss!r}")

    def evaluate(self, step: int, communicator: Communicator) -> bool:
        """Decide, where it is time to look."""
        if step % self.settings.every:
            return False
        total, count = communicator.sum_small(self._losses.cpu()).tolist()
        self._losses.zero_()
        if not count:
            self._notice_silence()
            return False
        self._silent = 0
        rate = LossRate(*self._record[:-1].tolist()).after(total / count, step, self.settings)
        ended = rate.ended(self.settings)
        fields = [*astuple(rate), float(step) if ended else -1.0]
        self._record.copy_(torch.tensor(fields, dtype=torch.float64, device="cpu"))
        return ended

    def _notice_silence(self) -> None:
        self._silent += 1
        if self._silent >= SILENCE and not self._warned:
            self._warned = True
            warn(
                f"hybrid= is on, but {SILENCE * self.settings.every} steps brought no finite loss: "
                "pass a closure to step(), or call optimizer.report_loss(loss) after each backward "
                "pass"
            )
