"""The Hugging Face Trainer: every promise of a plain loop, through its arguments and callbacks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import mkor
from mkor.integrations.huggingface import MKORCallback, optimizer_factory
from support.contestants import factors, same, weights

WINDOW = {"rank": 8, "vectors": 2, "rows": 8}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.4, patience=0.0, warmup=2, every=2)
OPTIMIZERS = {
    "mkor": partial(mkor.MKOR, **WINDOW),
    "mkor-h": partial(mkor.MKOR, hybrid=SWITCH, **WINDOW),
    "dense": partial(mkor.DenseMKOR, update_every=2),
    "kfac": partial(mkor.KFAC, inverse_every=2),
    "eva": mkor.Eva,
}

# The compiler itself instantiates every autograd function that it traces, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_process():
    """The arguments of a Trainer live on in the environment and in Accelerate's own state."""
    yield
    forget()


def forget():
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.compiler.reset()


def bert(seed=0, dropout=0.1, layers=1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForMaskedLM(config)


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def sequences(n=96, length=8):
    """Tokens that follow from the ones before, so that a small model learns them quickly."""
    start = torch.randint(32, (n, 1), generator=torch.Generator().manual_seed(0))
    ids = (start * 5 + 3 * torch.arange(length)) % 32
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(tmp_path, **how):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**(defaults | how))


def trainer(tmp_path, wrap=OPTIMIZERS["mkor"], model=None, base=None, **how):
    """A Trainer whose optimizer comes from the factory."""
    args = arguments(tmp_path, **how)
    kind = optimizer_factory(wrap, args, base)
    return Trainer(
        bert() if model is None else model,
        args,
        train_dataset=sequences(),
        eval_dataset=sequences(8),
        optimizer_cls_and_kwargs=kind,
    )


def run(*trainers, **how):
    """Train each from the same seed; dropout draws from it."""
    for trained in trainers:
        torch.manual_seed(5)
        trained.train(**how)
    return trainers[0]


def optimizer_of(trained):
    return trained.optimizer.optimizer


def saved(optimizer):
    """All that a checkpoint holds of an optimizer, by parameter and name."""
    entries = sorted(optimizer.state_dict()["state"].items())
    return [torch.as_tensor(entry[key]).clone() for _, entry in entries for key in sorted(entry)]


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def plain_loop(model, optimizer, steps, batch, accumulate, clip):
    """What the Trainer does, written out."""
    data = sequences()
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model.train()
    for i in range(steps):
        rows = [r["input_ids"] for r in data[i * batch * accumulate : (i + 1) * batch * accumulate]]
        for micro in range(accumulate):
            ids = torch.stack(rows[micro * batch : (micro + 1) * batch])
            model(ids, labels=ids, num_items_in_batch=len(rows) * ids.shape[1]).loss.backward()
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_argument(tmp_path, name):
    """``optimizers=(optimizer, None)`` is the plain loop, with accumulation and clipping."""
    model, other = bert(dropout=0.0), bert(dropout=0.0)
    a, b = (OPTIMIZERS[name](m, torch.optim.AdamW(m.parameters(), lr=5e-3)) for m in (model, other))
    how = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    trained = Trainer(
        model, arguments(tmp_path, **how), train_dataset=sequences(), optimizers=(a, None)
    )
    trained.train()
    plain_loop(other, b, 6, batch=4, accumulate=2, clip=0.5)
    assert same(weights(model), weights(other))
    assert same(factors(a), factors(b))
    assert a.diagnostics()["mkor/updates"] >= 3


# ------------------------------------------------------------------------------- the factory


OPTIMS = ["adamw_torch", "adamw_torch_fused", "adafactor", "rmsprop", "adamw_bnb_8bit"]


@pytest.mark.parametrize("optim", OPTIMS)
def test_factory_builds_the_trainers_base(tmp_path, optim):
    """The base, its numbers and its groups are those that the Trainer would have made itself."""
    how = {"optim": optim, "adam_beta2": 0.98, "adam_epsilon": 1e-7}
    ours = trainer(tmp_path, **how).create_optimizer()
    theirs = Trainer(bert(), arguments(tmp_path, **how)).create_optimizer()
    assert type(ours) is mkor.MKOR
    assert type(ours.base) is type(theirs)
    assert ours.curvature.rank == 8
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def test_factory_groups_by_weight_decay(tmp_path):
    """Biases and norms do not decay, and what is frozen is in no group."""
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    optimizer = trainer(tmp_path, model=model).create_optimizer()
    decaying, rest = optimizer.param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].rpartition(".")[2] for p in rest["params"]} == {"bias", "weight"}
    assert all("bias" in names[p] or "LayerNorm" in names[p] for p in rest["params"])
    assert not any("bias" in names[p] or "LayerNorm" in names[p] for p in decaying["params"])
    assert {*decaying["params"], *rest["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }


def test_factory_with_a_base(tmp_path):
    """It gets the groups and the Trainer's learning rate, which the schedule then moves."""
    base = partial(torch.optim.SGD, momentum=0.7)
    trained = trainer(tmp_path, base=base, learning_rate=0.03, max_steps=3)
    trained.train()
    optimizer = optimizer_of(trained)
    assert type(optimizer.base) is torch.optim.SGD
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["initial_lr"], group["momentum"]) == (0.03, 0.7)
        assert group["weight_decay"] == decay
        assert group["lr"] == 0.0  # after the last step of a linear schedule


def test_factory_over_muon(tmp_path):
    """A base of two parts: Muon for the matrices inside the model, AdamW for the rest."""
    model = bert()

    def muon(groups, lr):
        inner = {p for p in model.bert.encoder.parameters() if p.dim() == 2}
        chosen, rest = (
            [g | {"params": [p for p in g["params"] if (p in inner) == wanted]} for g in groups]
            for wanted in (True, False)
        )
        parts = torch.optim.Muon(chosen[:1], lr=lr), torch.optim.AdamW(rest, lr=lr)
        return mkor.Combined(*parts)

    wrap = partial(mkor.MKOR, sides="left", rescale=None, **WINDOW)
    trained = run(trainer(tmp_path, wrap, model, muon, max_steps=20, learning_rate=0.02))
    assert losses(trained)[-1] < losses(trained)[0] - 0.3
    groups = optimizer_of(trained).param_groups
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.1, 0.0), (0.1, 0.0), (0.0, 0.0)]


def test_factory_serves_model_init(tmp_path):
    """Each call of ``train`` makes a model; each gets an optimizer of its own, with hooks on it."""

    def init():  # the Trainer counts its arguments
        return bert()

    args = arguments(tmp_path, max_steps=3)
    trained = Trainer(
        model_init=init,
        args=args,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=optimizer_factory(mkor.MKOR, args, **WINDOW),
    )
    runs = []
    for _ in range(2):
        trained.train()
        runs.append((weights(trained.model), factors(optimizer_of(trained))))
    assert optimizer_of(trained).diagnostics()["mkor/updates"] == 3
    assert optimizer_of(trained).curvature == mkor.Window(**WINDOW)
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_training_again_continues(tmp_path):
    """A second call of ``train`` keeps the optimizer and its factors, and wraps nothing twice."""
    trained = trainer(tmp_path, max_steps=3)
    trained.train()
    optimizer = optimizer_of(trained)
    trained.train()
    assert optimizer_of(trained) is optimizer
    assert optimizer.diagnostics()["mkor/updates"] == 6


@pytest.mark.parametrize("how", [{"model": 1}, {"params": []}, {"optimizer_dict": {}}])
def test_factory_refuses_a_base_with_groups_of_its_own(tmp_path, monkeypatch, how):
    """GaLore, LOMO and the like choose their parameters themselves."""
    kind = staticmethod(lambda *_: (torch.optim.SGD, {"lr": 0.1} | how))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", kind)
    with pytest.raises(ValueError, match="makes its own parameter groups"):
        trainer(tmp_path).create_optimizer()


def test_factory_refuses_what_cannot_be_called(tmp_path):
    with pytest.raises(TypeError, match="wrapper must be a class or function, got 'mkor'"):
        optimizer_factory("mkor", arguments(tmp_path))
    with pytest.raises(TypeError, match="base must be a class or function"):
        optimizer_factory(mkor.MKOR, arguments(tmp_path), {"lr": 0.1})


# ------------------------------------------------------------------------- the Trainer's modes

COMPILED = {"torch_compile_backend": "aot_eager"}
EVERYTHING = {
    "bf16": True,
    "activation_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
}


@pytest.mark.parametrize(
    ("name", "make"),
    [("mkor", partial(bert, layers=2)), *((n, llama) for n in list(OPTIMIZERS)[1:])],
)
def test_everything_at_once(tmp_path, name, make):
    """bf16, checkpointing, accumulation and clipping: the loss falls, every layer has factors."""
    trained = trainer(
        tmp_path, OPTIMIZERS[name], make(), max_steps=12, num_train_epochs=2, **EVERYTHING
    )
    trained.train()
    assert sum(losses(trained)[-3:]) < sum(losses(trained)[:3]) - 0.3
    optimizer = optimizer_of(trained)
    assert {f.dtype for f in factors(optimizer) if f.is_floating_point()} == {torch.float32}
    figures = optimizer.diagnostics()
    assert figures["mkor/steps"] == 12
    assert figures["mkor/refused_updates"] == figures["mkor/raw_gradients"] == 0
    covered = [row.parameter for row in optimizer.coverage() if row.preconditioned]
    assert sum("layers.1" in p or "layer.1" in p for p in covered) == (7 if make is llama else 12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path, reentrant):
    """A layer that is run again in the backward pass counts once, with dropout.

    But for rounding: inputs that autograd does not keep are summed apart from other layers'.
    """
    how = {"use_reentrant": reentrant}
    plain = trainer(tmp_path)
    checkpointed = trainer(
        tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=how
    )
    run(plain, checkpointed)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(weights(plain.model), weights(checkpointed.model), **close)
    mine, theirs = factors(optimizer_of(plain)), factors(optimizer_of(checkpointed))
    torch.testing.assert_close(mine, theirs, **close)


def test_bf16_is_torch_autocast(tmp_path):
    trained = trainer(tmp_path, model=bert(dropout=0.0), bf16=True, max_grad_norm=0.5)
    trained.train()
    other = trainer(tmp_path, model=bert(dropout=0.0))
    optimizer = other.create_optimizer()
    forward = other.model.forward
    other.model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    plain_loop(other.model, optimizer, 6, batch=4, accumulate=1, clip=0.5)
    assert same(weights(trained.model), weights(other.model))
    assert same(factors(optimizer_of(trained)), factors(optimizer))


@pytest.mark.parametrize("name", ["mkor", "dense", "kfac", "eva"])
def test_torch_compile(tmp_path, name):
    """The hooks are there before the Trainer compiles; compiled training equals eager training."""
    trained = {}
    for how in ({}, COMPILED):
        forget()
        counters.clear()
        model = bert(dropout=0.0)
        trained[bool(how)] = run(trainer(tmp_path, OPTIMIZERS[name], model, **how))
        graphs = 2 if name == "dense" else 1  # between updates nothing is captured
        assert counters["frames"]["ok"] == (graphs if how else 0)
    eager, compiled = trained[False], trained[True]
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    for p, q in zip(factors(optimizer_of(compiled)), factors(optimizer_of(eager)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_logged_gradient_norm_is_the_raw_one(tmp_path):
    """The Trainer clips and logs before the step: the first norm is that of a run without mkor."""
    ours = trainer(tmp_path, max_steps=1, max_grad_norm=0.01)
    theirs = Trainer(
        bert(), arguments(tmp_path, max_steps=1, max_grad_norm=0.01), train_dataset=sequences()
    )
    norms = []
    for trained in (ours, theirs):
        run(trained)
        norms.append(trained.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.01
    for group in optimizer_of(ours).param_groups:
        assert sum(p.grad is not None for p in group["params"]) == 0  # the Trainer cleared them


# -------------------------------------------------------------------------------- checkpoints

RESUMED = {name: (name, {}) for name in OPTIMIZERS} | {
    "mkor-h": ("mkor-h", {"save_steps": 5, "max_steps": 24}),  # it switches at a low rate
    "mkor-everything": ("mkor", EVERYTHING),
    "mkor-compile": ("mkor", COMPILED | {"save_steps": 2, "max_steps": 4}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_bitwise(tmp_path, case):
    """A new Trainer goes on from a checkpoint as the run that never stopped, dropout included."""
    name, how = RESUMED[case]
    how = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6} | how
    saved_at = how["save_steps"]
    whole = trainer(tmp_path, OPTIMIZERS[name], bert(), **how)
    run(add_callback(whole))
    resumed = trainer(tmp_path, OPTIMIZERS[name], bert(seed=1), **how)
    run(add_callback(resumed), resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert same(weights(whole.model), weights(resumed.model))
    a, b = optimizer_of(whole), optimizer_of(resumed)
    assert same(saved(a), saved(b))
    assert losses(whole) == losses(resumed)
    assert a.switched_at == b.switched_at
    assert (a.switched_at is not None and a.switched_at > saved_at) == (name == "mkor-h")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_resume_of_lora_is_bitwise(tmp_path):
    """The adapters are all that is trained, preconditioned and saved."""

    def adapted():
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        return get_peft_model(llama(), config)

    how = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 0.02}
    whole = run(trainer(tmp_path, model=adapted(), **how))
    resumed = trainer(tmp_path, model=adapted(), **how)
    run(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole.model), weights(resumed.model))
    a, b = optimizer_of(whole), optimizer_of(resumed)
    assert same(saved(a), saved(b))
    assert losses(whole)[-1] < losses(whole)[0]
    covered = [row.parameter for row in a.coverage() if row.preconditioned]
    assert len(covered) == 8
    assert all("lora_" in name for name in covered)


def test_continue_the_checkpoint_of_a_run_without_preconditioning(tmp_path):
    """The base goes on with its moments; the factors start anew."""
    how = {"save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch"}
    plain = Trainer(bert(), arguments(tmp_path, **how), train_dataset=sequences())
    plain.train()
    resumed = trainer(tmp_path, model=bert(seed=1), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(resumed)[:6] == losses(plain)[:6]  # the sixth is computed before its step
    optimizer = optimizer_of(resumed)
    assert optimizer.diagnostics()["mkor/updates"] == 1
    assert all(entry["step"] == 6 for entry in optimizer.state.values())


# --------------------------------------------------------------------------------- the callback


def add_callback(trained, **how):
    trained.add_callback(MKORCallback(trained, **how))
    return trained


def diagnostics(trained):
    return [entry for entry in trained.state.log_history if "mkor/steps" in entry]


def test_callback_logs_totals(tmp_path):
    trained = add_callback(trainer(tmp_path, logging_steps=2, max_steps=7), every=2)
    trained.train()
    assert [(e["step"], e["mkor/steps"]) for e in diagnostics(trained)] == [(4, 4)]
    assert set(diagnostics(trained)[0]) >= {"mkor/layers", "mkor/refused_updates", "epoch"}
    assert all(k.startswith("mkor/") or k in ("step", "epoch") for k in diagnostics(trained)[0])
    assert [e["step"] for e in trained.state.log_history if "loss" in e] == [2, 4, 6]


def test_callback_logs_layers(tmp_path):
    trained = add_callback(trainer(tmp_path), layers=True)
    trained.train()
    name = "bert.encoder.layer.0.output.dense/norm_ratio"
    assert [e["step"] for e in diagnostics(trained)] == [1, 2, 3, 4, 5, 6]
    assert all(0 < e[name] < 10 for e in diagnostics(trained))
    assert "bert.encoder.layer.0.output.dense/cosine" in diagnostics(trained)[-1]


def test_callback_changes_no_number(tmp_path):
    plain, watched = trainer(tmp_path), add_callback(trainer(tmp_path), layers=True)
    run(plain, watched)
    assert same(weights(plain.model), weights(watched.model))
    assert losses(plain) == losses(watched)


def test_callback_ignores_evaluation(tmp_path):
    """Evaluation losses are neither reported nor followed by figures; evaluating counts nothing."""
    args = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 3}
    trained, plain = (
        trainer(tmp_path, model=bert(dropout=0.0), **how) for how in (args, {"logging_steps": 3})
    )
    run(add_callback(trained), plain)
    assert [e["step"] for e in diagnostics(trained)] == [3, 6]
    assert sum("eval_loss" in e for e in trained.state.log_history) == 6
    assert same(weights(plain.model), weights(trained.model))


def test_tensorboard(tmp_path, monkeypatch):
    """What the callback logs reaches the Trainer's own TensorBoard writer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trained = add_callback(trainer(tmp_path, report_to=["tensorboard"]), every=3)
    trained.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [e.step for e in events.Scalars("train/mkor/updates")] == [3, 6]
    assert [e.value for e in events.Scalars("train/mkor/updates")] == [3.0, 6.0]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(trained))


def test_callback_feeds_the_hybrid(tmp_path, monkeypatch):
    """The switch hears of the logged losses, and of nothing else, as in a loop that reports."""
    heard = []
    monkeypatch.setattr(mkor.MKOR, "report_loss", lambda _, loss: heard.append(loss))
    trained = add_callback(trainer(tmp_path, OPTIMIZERS["mkor-h"], logging_steps=2))
    trained.train()
    assert heard == losses(trained)
    assert len(heard) == 3


def test_hybrid_switches(tmp_path):
    """It hands over to the base and says so; without the callback it would never."""
    trained = run(add_callback(trainer(tmp_path, OPTIMIZERS["mkor-h"], max_steps=24)))
    optimizer = optimizer_of(trained)
    last = optimizer.switched_at
    assert 1 < last < 24
    assert [e["mkor/switched"] for e in diagnostics(trained)] == [0.0] * (last - 1) + [1.0] * (
        25 - last
    )
    assert not any(k.startswith("mkor_") for e in optimizer.state.values() for k in e)


@pytest.mark.parametrize("how", [{"logging_steps": 3}, {"logging_strategy": "epoch"}], ids=str)
def test_callback_refuses_a_hybrid_that_would_not_hear(tmp_path, how):
    trained = add_callback(trainer(tmp_path, OPTIMIZERS["mkor-h"], **how))
    with pytest.raises(ValueError, match="every 2 steps, but the Trainer logs it"):
        trained.train()


def test_callback_refuses_other_optimizers(tmp_path):
    trained = Trainer(bert(), arguments(tmp_path), train_dataset=sequences())
    with pytest.raises(TypeError, match="needs an optimizer of mkor, the Trainer's is AdamW"):
        add_callback(trained).train()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_callback_refuses_wrong_numbers(tmp_path, every):
    with pytest.raises(ValueError, match="positive whole number"):
        MKORCallback(trainer(tmp_path), every)
