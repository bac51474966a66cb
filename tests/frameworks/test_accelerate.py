"""Accelerate: prepared, accumulated, clipped, saved and loaded, bitwise as in a plain loop."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from mkor import MKOR
from support.contestants import ROWS, factors, report, same, seeded, weights

NAMES = [
    "mkor+adamw-fused",
    "mkor-h+adamw",
    "dense[exact]+adamw",
    "kfac[pi,running]+adamw",
    "eva+adamw",
]


@pytest.fixture(params=NAMES, name="row")
def _row(request):
    return ROWS[request.param]


@pytest.fixture(autouse=True)
def _fresh_states():
    """Accelerate keeps its set-up in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(steps=24, n=6):
    x = torch.randn(steps * n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.flatten(1).sum(1) > 0).long()), batch_size=n)


def schedule(optimizer):
    return OneCycleLR(optimizer, 0.02, 12, cycle_momentum=False)


class Run:
    """A model with its optimizer, schedule and data, all prepared."""

    def __init__(self, row, seed=0, accumulate=2, precision="no"):
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        model = seeded(seed=seed)
        self.wrapper = row.make(model)
        self.model, self.optimizer, self.scheduler, self.data = self.accelerator.prepare(
            model, self.wrapper, schedule(self.wrapper), loader()
        )

    def train(self, batches):
        losses = []
        for x, y in batches:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.accelerator.backward(loss)
                report(self.wrapper, loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    @property
    def results(self):
        return weights(self.model) + saved(self.wrapper)


def saved(optimizer):
    """All that a checkpoint holds of an optimizer, by parameter and name."""
    entries = sorted(optimizer.state_dict()["state"].items())
    return [torch.as_tensor(entry[key]).clone() for _, entry in entries for key in sorted(entry)]


def plain_loop(model, optimizer, autocast=False):
    """The same, written out."""
    scheduler = schedule(optimizer)
    for i, (x, y) in enumerate(loader()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        (loss / 2).backward()
        report(optimizer, loss)
        if i % 2:
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def test_prepare_wraps_ours(row):
    """The optimizer is used as it is; its state makes a round trip before any step."""
    run = Run(row)
    assert type(run.optimizer) is AcceleratedOptimizer
    assert run.optimizer.optimizer is run.wrapper
    assert run.optimizer.param_groups is run.wrapper.param_groups
    assert not run.wrapper.base.state


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_is_the_plain_loop(row, precision):
    """Accumulated, clipped and scheduled: weights, factors and the base's state are the same."""
    run = Run(row, precision=precision)
    losses = run.train(run.data)
    model = seeded()
    optimizer = row.make(model)
    plain_loop(model, optimizer, autocast=precision == "bf16")
    assert same(run.results, weights(model) + saved(optimizer))
    assert optimizer.switched_at == run.wrapper.switched_at
    assert sum(losses[-6:]) < sum(losses[:6])
    assert {f.dtype for f in factors(run.wrapper) if f.is_floating_point()} <= {torch.float32}


@pytest.mark.parametrize("stop", [10, 20])
def test_resume_is_bitwise(row, tmp_path, stop):
    """``save_state`` and ``load_state``; the hybrid has switched at the second stop."""
    whole = Run(row)
    batches = list(whole.data)
    whole.train(batches[:stop])
    whole.accelerator.save_state(str(tmp_path))
    rest = whole.train(batches[stop:])
    resumed = Run(row, seed=1)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.train(batches[stop:]) == rest
    assert same(whole.results, resumed.results)
    assert whole.wrapper.switched_at == resumed.wrapper.switched_at


def test_a_hybrid_switches():
    """What the test above relies on."""
    run = Run(ROWS["mkor-h+adamw"])
    run.train(run.data)
    assert 5 < run.wrapper.switched_at <= 10


def test_no_sync_micro_batches_leave_weights_alone(row):
    run = Run(row, accumulate=3)
    before = weights(run.model)
    batches = list(run.data)
    run.train(batches[:2])
    assert same(before, weights(run.model))
    run.train(batches[2:3])
    assert not same(before, weights(run.model))
    assert run.wrapper.diagnostics()["mkor/updates"] == 1


def test_overflow_under_the_scaler(row):
    """Accelerate replaces ``step`` to see a skipped one, and may clear the model's gradients only.

    What the skipped passes left behind costs one update, and spoils nothing.
    """
    model = seeded()
    wrapper = row.make(model)
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(
        wrapper, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    )
    skipped = []
    for i, (x, y) in enumerate(loader(6)):
        before = weights(model)
        factor = torch.inf if i == 2 else 1.0
        loss = nn.functional.cross_entropy(model(x), y) * factor
        optimizer.scaler.scale(loss).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        assert same(before, weights(model)) == skipped[-1]
        model.zero_grad()
    assert skipped == [False, False, True, False, False, False]
    assert all(f.isfinite().all() for f in factors(wrapper) + weights(model))
    figures = wrapper.diagnostics()
    assert figures["mkor/steps"] == 5
    assert figures["mkor/refused_updates"] <= figures["mkor/layers"]


def test_prepared_base_is_refused():
    """It would skip steps of accumulation while the gradients are preconditioned again."""
    model = torch.nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    model, prepared = Accelerator(cpu=True).prepare(model, base)
    with pytest.raises(TypeError, match="wrap your own optimizer first"):
        MKOR(model, prepared)
