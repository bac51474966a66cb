"""Lightning 2 trains with every optimizer of the library as a plain loop does, to the last bit."""

import functools
from contextlib import nullcontext

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import mkor
from mkor.integrations.lightning import MKORCallback
from support.contestants import PREFIX, ROWS, batch, entries, factors, hooks, same, seeded, weights

CHOSEN = ["mkor+adamw", "dense[exact]+adamw", "kfac+sgd-momentum", "eva+adamw"]
BATCHES = 6

pytestmark = [
    # Lightning asks torch's tree utilities a question that torch has renamed.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    # The loaders here hold six batches and need no processes of their own.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(params=CHOSEN, name="row")
def _row(request):
    return ROWS[request.param]


class Task(lightning.LightningModule):
    """The contract's net as a user of Lightning would write it."""

    def __init__(self, row, seed=0, **options):
        super().__init__()
        self.net = seeded(seed=seed)
        self.row, self.options = row, options

    def training_step(self, data, _index):
        x, y = data
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.row.make(self, **self.options)


class Scheduled(Task):
    """With a schedule that moves in every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * BATCHES)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Task):
    """Manual optimisation: two micro-batches a step and a pass that does not count."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.automatic_optimization = False

    def training_step(self, data, index):
        optimizer = self.optimizers()
        loss = super().training_step(data, index)
        if index % 2 == 0:
            optimizer.zero_grad()
        with optimizer.no_capture():
            torch.autograd.grad(self.net(data[0]).sum(), self.net.first.weight)
        self.manual_backward(loss / 2)
        if index % 2 == 1:
            optimizer.step()
        return {"loss": loss}


def loader(batches=BATCHES):
    return torch.utils.data.DataLoader([batch(i) for i in range(batches)], batch_size=None)


def fit(task, epochs=1, resume=None, batches=BATCHES, **how):
    """Train, quietly; returns the optimizer."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = lightning.Trainer(max_epochs=epochs, **(quiet | how))
    trainer.fit(task, loader(batches), ckpt_path=resume, weights_only=resume and True)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is task.row.wrap
    return optimizer


def plain(task, steps, *, micro=1, clip=None, autocast=None):
    """The same training without Lightning; returns the optimizer."""
    model = task.net
    optimizer = task.configure_optimizers()
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(micro):
            x, y = batch(step * micro + i, dtype=dtype)
            cast = torch.autocast("cpu", autocast, cache_enabled=False) if autocast else None
            with cast or nullcontext():
                loss = cross_entropy(model(x), y)
            (loss / micro).backward()
        if clip:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return optimizer


def assert_same_run(first, second):
    """Two tasks and their optimizers ended bitwise alike, and the optimizers did something."""
    (task, optimizer), (other, expected) = first, second
    assert same(weights(task), weights(other))
    assert same(factors(optimizer), factors(expected))
    assert optimizer.diagnostics()["mkor/updates"] > 0


# What is below trains all in float32.
PRECISIONS = [(name, kind) for name in CHOSEN for kind in ("bf16-mixed", "bf16-true")]


@pytest.mark.parametrize(("name", "precision"), [*PRECISIONS, ("mkor+adamw", "32-true")])
def test_precisions(name, precision):
    row = ROWS[name]
    task, other = Task(row), Task(row)
    if precision == "bf16-true":
        other.bfloat16()
    optimizer = fit(task, precision=precision)
    expected = plain(other, BATCHES, autocast=torch.bfloat16 if "mixed" in precision else None)
    assert_same_run((task, optimizer), (other, expected))
    kept = {f.dtype for f in factors(optimizer) if f.is_floating_point()}
    assert kept == {torch.float32}
    assert task.net.first.weight.dtype == (
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    )


def test_accumulation_and_clipping(row):
    task, other = Task(row), Task(row)
    optimizer = fit(task, accumulate_grad_batches=2, gradient_clip_val=0.05)
    assert_same_run((task, optimizer), (other, plain(other, BATCHES // 2, micro=2, clip=0.05)))


def test_manual_optimisation(row):
    """Lightning's stand-in for the optimizer offers what the optimizer does."""
    task, other = Manual(row), Task(row)
    optimizer = fit(task)
    assert_same_run((task, optimizer), (other, plain(other, BATCHES // 2, micro=2)))


# A resumed run goes on in the folder of the first.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume(row, tmp_path):
    """From the first epoch's checkpoint, in a new trainer and a model of other weights."""
    precision = ("32-true", "bf16-mixed")[[ROWS[name] for name in CHOSEN].index(row) % 2]

    def fit_and_save(task, resume=None):
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        how = {"precision": precision, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        return fit(task, 3, resume, callbacks=[keep], **how)

    task, other = Scheduled(row), Scheduled(row, seed=1)
    optimizer = fit_and_save(task)
    resumed = fit_and_save(other, tmp_path / "epoch=0.ckpt")
    assert_same_run((task, optimizer), (other, resumed))
    rates = [[g["lr"] for g in o.param_groups] for o in (optimizer, resumed)]
    assert rates[0] == rates[1]
    assert resumed.diagnostics()["mkor/steps"] == 3 * BATCHES // 2


def test_second_fit_takes_over():
    """``fit`` builds optimizers anew: the first one is closed, and its hooks are gone."""
    task = Task(ROWS["mkor+adamw"])
    first = fit(task)
    count = hooks(task)
    with pytest.warns(UserWarning, match="closed"):
        second = fit(task)
    assert hooks(task) == count
    assert factors(first) == []
    assert second.diagnostics()["mkor/steps"] == BATCHES


@pytest.mark.parametrize("name", ["mkor+adamw", "kfac+sgd-momentum"])
def test_ema(name):
    """Lightning's moving average copies the model and replaces its weights at the end."""
    task, other = Task(ROWS[name]), Task(ROWS[name])
    optimizer = fit(task, callbacks=[EMAWeightAveraging(decay=0.5)])
    expected = plain(other, BATCHES)
    assert same(factors(optimizer), factors(expected))
    assert not same(weights(task), weights(other))


def test_swa():
    """Lightning's stochastic average takes over the schedule and swaps the model's weights."""
    task, other = (Task(ROWS["mkor+adamw"]) for _ in range(2))
    rate = fit(other, 3).param_groups[0]["lr"]
    optimizer = fit(task, 3, callbacks=[StochasticWeightAveraging(rate, swa_epoch_start=1)])
    assert optimizer.diagnostics()["mkor/steps"] == 3 * BATCHES
    assert all(p.isfinite().all() for p in weights(task))
    assert not same(weights(task), weights(other))


# --------------------------------------------------------------------------- losses and figures

SWITCH = mkor.LossRateSwitch(every=1000)


def losses_heard(optimizer):
    """Sum and number of the losses since the switch's last look."""
    return entries(optimizer)[0][PREFIX + "losses"].tolist()


@pytest.mark.parametrize(
    ("name", "callbacks"), [*((name, []) for name in CHOSEN), ("mkor+adamw", [MKORCallback])]
)
def test_closure_feeds_the_switch(name, callbacks):
    """Lightning passes a closure to every step: its loss counts, and counts once."""
    row = ROWS[name]
    task = Task(row, hybrid=SWITCH)
    optimizer = fit(task, callbacks=[make() for make in callbacks])
    total, count = losses_heard(optimizer)
    assert count == BATCHES
    other = Task(row)
    expected, model = 0.0, other.net
    optimizer = other.configure_optimizers()
    for i in range(BATCHES):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch(i)[0]), batch(i)[1])
        expected += loss.item()
        loss.backward()
        optimizer.step()
    assert total == pytest.approx(expected)


def scaled():
    """Lightning allows float16 with a scaler on a CPU where it is asked for it like this."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


WITHOUT_CLOSURE = {
    "accumulation": (Task, {"accumulate_grad_batches": 3}),
    "manual": (Manual, {}),
    "scaler": (Task, {"plugins": scaled}),
    "manual scaler": (Manual, {"plugins": scaled}),
}


def heard(name, way, **how):
    kind, options = WITHOUT_CLOSURE[way]
    how |= {key: value() if callable(value) else value for key, value in options.items()}
    return losses_heard(fit(kind(ROWS[name], hybrid=SWITCH), **how))


@functools.cache
def heard_without_a_callback(way):
    return heard("mkor+adamw", way)


# In turn: every way meets two optimizers, every optimizer two ways.
@pytest.mark.parametrize(
    ("name", "way"),
    [(CHOSEN[(i + j) % 4], way) for i, way in enumerate(WITHOUT_CLOSURE) for j in (0, 1)],
)
def test_callback_reports_what_no_closure_does(name, way):
    total, count = heard(name, way, callbacks=[MKORCallback()])
    assert heard_without_a_callback(way)[1] < count == BATCHES
    assert 0 < total / count < 2


def test_switch_under_lightning():
    """MKOR-H hands over to the base in the middle of a run, and the rest is the base's."""
    task = Task(ROWS["mkor-h+adamw"])
    optimizer = fit(task, 2, callbacks=[MKORCallback(every=1)])
    assert optimizer.switched_at == 6
    assert hooks(task) == 0


def test_callback_removes_the_scale(row):
    """With a scale that keeps growing the factors stay those of a run without one."""
    for kind in (Task, Manual):
        task, other = kind(row), Task(row)
        how = {"micro": 2} if kind is Manual else {}
        optimizer = fit(task, plugins=scaled(), callbacks=[MKORCallback()])
        expected = plain(other, BATCHES // how.get("micro", 1), autocast=torch.float16, **how)
        assert optimizer.loss_scale > 2.0**10
        for found, right in zip(factors(optimizer), factors(expected), strict=True):
            torch.testing.assert_close(found, right, rtol=0.05, atol=0.05)


def test_scale_set_in_manual_optimisation(row):
    """What is set on Lightning's stand-in reaches the optimizer."""

    class Scaled(Manual):
        def manual_backward(self, loss):
            self.optimizers().loss_scale = 64.0
            super().manual_backward(loss * 64.0)

        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                p.grad /= 64.0

    task, other = Scaled(row), Task(row)
    optimizer = fit(task)
    assert optimizer.loss_scale == 64.0
    assert_same_run((task, optimizer), (other, plain(other, BATCHES // 2, micro=2)))


@pytest.mark.parametrize(
    ("name", "every", "layers"),
    [
        ("mkor+adamw", 1, True),
        ("dense[exact]+adamw", 2, True),
        ("kfac+sgd-momentum", 2, False),
        ("eva+adamw", 1, False),
    ],
)
def test_callback_logs_to_tensorboard(name, every, layers, tmp_path):
    row = ROWS[name]
    task = Scheduled(row)
    callbacks = [MKORCallback(every, layers), LearningRateMonitor("step", log_momentum=True)]
    logger = TensorBoardLogger(tmp_path)
    optimizer = fit(task, 2, logger=logger, callbacks=callbacks, batches=2)
    log = EventAccumulator(logger.log_dir).Reload()
    tags = log.Tags()["scalars"]
    figures = {name for name in optimizer.diagnostics() if layers or name.startswith("mkor/")}
    assert {tag for tag in tags if "/" in tag} == figures
    assert layers == ("net.first/cosine" in tags)
    steps = [event.step for event in log.Scalars("mkor/steps")]
    assert steps == list(range(every, 5, every))
    assert [event.value for event in log.Scalars("mkor/steps")] == steps
    assert any(tag.startswith("lr-") for tag in tags)


def test_callback_takes_several_optimizers(tmp_path):
    """Each has its own names in the log."""

    class Two(Manual):
        def configure_optimizers(self):
            row = ROWS["mkor+adamw"]
            parts = (self.net.conv, nn.ModuleList([self.net.first, self.net.again]))
            return [row.make(part, part.parameters(), skip_output=False) for part in parts]

        def training_step(self, data, index):
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(Task.training_step(self, data, index))
            first.step()
            second.step()

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[MKORCallback(3, layers=True)],
    )
    trainer.fit(Two(None), loader())
    tags = EventAccumulator(trainer.logger.log_dir).Reload().Tags()["scalars"]
    assert {"0/mkor/steps", "1/mkor/steps", "1/0/norm_ratio"} <= set(tags)


def test_callback_without_an_optimizer_of_ours():
    class Ordinary(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MKORCallback()],
    )
    with pytest.raises(TypeError, match=r"trainer's are SGD: return MKOR\(self, base\)"):
        trainer.fit(Ordinary(None), loader())


@pytest.mark.parametrize("every", [0, True, 2.5, None])
def test_callback_settings(every):
    with pytest.raises(ValueError, match="every must be a positive whole number"):
        MKORCallback(every)
