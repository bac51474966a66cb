"""``mkor overhead``: operators, waits and memory are counted right; times are never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mkor.bench import overhead
from mkor.bench.cli import main
from mkor.bench.contestants import parse_contestant
from mkor.bench.models import MODELS, Subject, Worker, model_subject

TINY = {
    "mlp": {"width": 8, "depth": 2, "rows": 40},
    "transformer": {"width": 8, "depth": 1, "batch": 2, "context": 4},
    "bert-base-block": {"width": 8, "depth": 1, "batch": 2, "context": 4},
    "bert-base-shapes": {"width": 8, "depth": 2, "batch": 2, "context": 4},
    "conv-net": {"width": 4, "depth": 1, "batch": 3},
}


def worker(text: str, name: str = "mlp") -> Worker:
    return overhead.prepare([parse_contestant(text)], model_subject(name, TINY[name]))[0]


def counted(work, monkeypatch: pytest.MonkeyPatch) -> overhead.Counts:
    """What is counted where a step is a piece of work."""
    made = worker("sgd")
    monkeypatch.setattr(made, "iterate", work)
    return overhead.count(made, 2)


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", TINY)
def test_models_are_the_same_each_time_and_train(name: str) -> None:
    subject = model_subject(name, TINY[name])
    inputs, target = subject.batch
    first, second = subject.build(), subject.build()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    subject.loss(first(inputs), target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())


def test_models_have_the_sizes_of_the_books() -> None:
    """ResNet-20 has 0.27 million weights, ResNet-50 without its classifier 23.5 million."""

    def count(name: str) -> int:
        sizes, make, *_ = MODELS[name]
        with torch.device("meta"):
            return sum(p.numel() for p in make(sizes).parameters())

    assert count("conv-net") == 272_474
    assert count("resnet50") == 23_508_032 + 10 * 2049
    matrices = 4 * 768 * 769 + 3072 * 769 + 768 * 3073 + 4 * 768
    assert count("bert-base-block") == matrices + 16 * 769
    assert count("bert-base-shapes") == 12 * matrices + 16 * 769


def test_preconditioned_layers_have_their_bias_as_an_input() -> None:
    assert worker("mkor+sgd").layers() == [(8, 9)] * 2
    assert worker("mkor+sgd", "conv-net").layers()[0] == (4, 27)
    assert worker("sgd").layers() == []


# ---------------------------------------------------------------------------- operators and waits


def test_operators_are_counted_in_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x, linear = torch.ones(6, 7), nn.Linear(7, 2)

    def work() -> None:
        with torch.profiler.record_function("step"):
            y = x + 1
            with torch.profiler.record_function("mkor.update"):
                # Transposing and a product with the bias; an inner range that is no part.
                with torch.profiler.record_function("inner"), torch.no_grad():
                    linear(y)
                y.T.mul(2)
        x.neg()

    counts = counted(work, monkeypatch)
    assert counts.calls == {"step": 1, "mkor.update": 4, "": 1}
    assert counts.waits == {}
    assert counts.flops == 2 * 6 * 7 * 2


X, MASK = torch.rand(3, 3) + 3 * torch.eye(3), torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (X[0, 0].item, "_local_scalar_dense"),
        (lambda: bool(MASK.all()), "_local_scalar_dense"),
        (lambda: float(X[0, 0]), "_local_scalar_dense"),
        (lambda: X[MASK], "index"),
        (lambda: X.clone().index_put_((MASK,), X[0, 0]), "index_put_"),
        (MASK.nonzero, "nonzero"),
        (lambda: torch.where(MASK), "nonzero"),
        (lambda: torch.linalg.inv(X), "_linalg_check_errors"),
        (lambda: torch.linalg.eigh(X), "_linalg_eigh"),
        (lambda: torch.tensor(1.0), "lift_fresh"),
        (X.tolist, "tolist"),
        (X.numpy, "numpy"),
        (X.cpu, "cpu"),
    ],
)
def test_what_waits_for_a_device_is_counted(work, name, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(work, monkeypatch).waits == {name: 1}


def test_what_does_not_wait_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        torch.where(MASK, X, 0.0)
        X[:, torch.zeros(1, dtype=torch.long)]
        X.to(torch.float64).masked_fill(MASK, 0)
        torch.linalg.cholesky_ex(X @ X.mT)
        torch.zeros(2).copy_(X[0, :2])

    assert counted(work, monkeypatch).waits == {}


def test_a_curvature_that_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step has an update, with one more operator that waits and one that does not."""
    from mkor import RankOne

    def counts() -> tuple[float, float]:
        found = overhead.count(worker("eva[update_every=2]+sgd"), 4)
        return sum(found.waits.values()), sum(found.calls.values())

    (waits, calls), update, updates = counts(), RankOne.update, []

    def slow(self, *args, **how):
        updates.append(torch.zeros(1).item())
        return update(self, *args, **how)

    monkeypatch.setattr(RankOne, "update", slow)
    more_waits, more_calls = map(float.__sub__, counts(), (waits, calls))
    # Of nine steps, five warm up.
    assert more_waits == len(updates) * 2 / 5 / 4 > 0
    assert more_calls == 2 * more_waits


def test_calls_per_layer_are_those_beyond_the_same_base() -> None:
    """Whoever is first: an optimizer that is not the wrapper's base does not enter."""
    subject = model_subject("mlp", TINY["mlp"])

    def found(text: str) -> overhead.Timing:
        workers = overhead.prepare([parse_contestant(each) for each in text.split(",")], subject)
        overhead.take_turns(workers, 2)
        return overhead.examine(workers, 2)[-1]

    one, two = found("adamw,mkor+adamw"), found("sgd,mkor+adamw")
    assert one.layers == 2
    assert one.layer_calls == two.layer_calls
    assert one.waits == two.waits
    base = overhead.count(worker("adamw"), 2)
    beyond = sum(one.counts.calls.values()) - sum(base.calls.values())
    assert one.layer_calls == beyond / 2 > 5
    assert len(one.cpu_samples) == 2
    assert found("mkor+adamw,adamw").layer_calls is None


# ------------------------------------------------------------------------------------------ memory


def test_peak_is_that_of_the_running_sum() -> None:
    assert overhead.peak_of([]) == 0
    assert overhead.peak_of([-5, 3]) == 0
    assert overhead.peak_of([4, 4, -8, 6, 1, -3]) == 8


def test_peak_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker("sgd")

    def work() -> list[tuple[float, float]]:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        second += 1
        return [(0.0, 0.0), (1.0, 1.0)]

    monkeypatch.setattr(made, "iterate", work)
    assert overhead.profile(made, 3).peak_bytes == pytest.approx(4 * 1500, abs=64)


def test_state_and_buffers() -> None:
    """MKOR keeps a window and sums; the base neither, and MKOR-H neither after its switch."""
    subject = model_subject("mlp", TINY["mlp"])
    labels = ("adamw", "mkor[rank=4,vectors=2,rows=3]+adamw", "mkor-h+adamw")
    workers = overhead.prepare([parse_contestant(label) for label in labels], subject)
    overhead.take_turns(workers, 1)
    base, made, switched = overhead.examine(workers, 1)
    windows, sums = 4 * 4 * 2 * (8 + 8), 4 * 2 * 2 * (8 + 9)
    assert made.state_bytes - base.state_bytes >= windows
    assert sums <= made.buffer_bytes <= 4 * sums
    assert base.buffer_bytes == base.extra_memory == 0
    assert switched.state_bytes == base.state_bytes
    assert switched.buffer_bytes < sums
    weights = 4 * (2 * 8 * 9 + 16 * 9)
    extra = made.state_bytes - base.state_bytes
    assert made.extra_memory == pytest.approx(extra / (2 * weights + base.state_bytes))


def test_quartiles() -> None:
    assert overhead.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert overhead.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_products_in_bfloat16() -> None:
    subject = Subject(**{**vars(model_subject("mlp", TINY["mlp"])), "autocast": torch.bfloat16})
    made = Worker(parse_contestant("mkor+sgd"), subject)
    seen = []
    made.model[0].register_forward_hook(lambda _m, _x, output: seen.append(output.dtype))
    made.iterate()
    assert seen == [torch.bfloat16]


# ----------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "conv-net", "--context", "3"], "conv-net has no --context"),
        (["--model", "transformer", "--rows", "3"], "transformer has no --rows"),
        (["--model", "text-lm", "--rows", "3"], "--rows is for mlp"),
        (["--model", "transfomer"], "Did you mean 'transformer'"),
        (["--plot", "no/such/folder/x.png"], "there is no folder"),
        (["mkr+adamw"], "Did you mean 'mkor'"),
    ],
)
def test_wrong_requests_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["overhead", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_must_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["overhead", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_the_command_prints_draws_and_stores_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "keep_memory", lambda: True)
    record, picture = tmp_path / "o.json", tmp_path / "o.png"
    words = ["adamw,mkor+adamw", "--model", "transformer", "--rounds", "2", "--quiet"]
    words += [w for key, size in TINY["transformer"].items() for w in (f"--{key}", str(size))]
    assert main(["overhead", *words, "--json", str(record), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    for expected in ("calls per layer", "host waits", "buffers", "peak memory", "precondition"):
        assert expected in shown
    stored = json.loads(record.read_text(encoding="utf-8"))
    assert stored["model"]["name"] == "transformer"
    assert stored["memory_kept"] is True
    assert stored["environment"]["packages"]["torch"]
    base, wrapped = stored["timings"]
    assert wrapped["layers"] == 6
    assert len(wrapped["cpu_samples"]) == stored["rounds"] == 2
    parts = {"forward", "backward", "step", "mkor.capture", "mkor.update", "mkor.precondition"}
    assert parts <= wrapped["profile"]["parts_ms"].keys()
    # The wrapped base does what it does alone.
    assert wrapped["counts"]["calls"]["mkor.base_step"] == base["counts"]["calls"]["step"]
    assert wrapped["counts"]["flops"] > base["counts"]["flops"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
