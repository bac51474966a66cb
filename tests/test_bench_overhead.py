"""`mkor overhead`: what it times, what it counts, and the bounds; no time is asserted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mkor import native
from mkor.bench import memory, overhead_limits
from mkor.bench.cli import main
from mkor.bench.contestants import parse_contestant
from mkor.bench.overhead_counts import Profile, peak_of, profile_once, summarize_counts
from mkor.bench.overhead_limits import (
    Machine,
    has_limits,
    layers_of,
    least_work,
    limits_of,
    measure_machine,
)
from mkor.bench.overhead_models import MODELS, make_conv_net, make_resnet50, model_subject
from mkor.bench.progress import Progress
from mkor.bench.timing import quartiles, summarize_all
from mkor.bench.turns import run_all
from mkor.bench.worker import Subject, Worker

TINY = {
    "mlp": {"width": 8, "depth": 2, "rows": 12},
    "transformer": {"width": 8, "depth": 1, "batch": 2, "context": 5},
    "bert-base-block": {"width": 8, "batch": 2, "context": 5},
    "conv-net": {"width": 4, "depth": 1, "batch": 3},
}
MACHINE = Machine({1000: 1e3, 10**12: 1e6}, operations=2e6, call=0.5)


def tiny(name: str) -> Subject:
    return model_subject(name, TINY[name])


def worker(contestant: str, subject: Subject) -> Worker:
    made = Worker(parse_contestant(contestant), subject)
    made.warm_up()
    return made


@pytest.mark.parametrize("name", TINY)
def test_models_train(name: str) -> None:
    subject = tiny(name)
    inputs, target = subject.batch
    first, second = subject.build(), subject.build()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    loss = subject.loss(first(inputs), target)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())


def test_bert_base_block_has_its_shapes() -> None:
    sizes = MODELS["bert-base-block"].sizes
    assert sizes["batch"] * sizes["context"] == 2048
    with torch.device("meta"):
        model = MODELS["bert-base-block"].build(sizes)
    shapes = [tuple(p.shape) for p in model[0].parameters() if p.dim() == 2]
    assert sorted(shapes) == [(768, 768)] * 4 + [(768, 3072), (3072, 768)]


def test_residual_nets_are_those_of_the_books() -> None:
    """ResNet-20 has 0.27 million weights, ResNet-50 without its classifier 23.5 million."""
    with torch.device("meta"):
        small, large = make_conv_net(16, 3), make_resnet50()

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    # With the projections that replace the paper's padded shortcuts.
    assert count(small) == 272_474
    assert count(large) == 23_508_032 + 10 * 2049
    matrices = [m for m in large.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(matrices) == 50 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "conv-net", "--context", "3"], "conv-net has no --context"),
        (["--model", "transformer", "--rows", "3"], "transformer has no --rows"),
        (["--model", "transfomer"], "Did you mean 'transformer'"),
        (["--plot", "no/such/folder/x.png"], "there is no folder"),
        (["--scaling", "--limits"], "takes no limits"),
        (["--scaling", "--device", "cuda"], "takes no device"),
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


def test_calls_of_operators_are_counted_where_they_are_made() -> None:
    x = torch.ones(6, 7)

    def work() -> None:
        with torch.profiler.record_function("step"):
            y = x + 1
            with torch.profiler.record_function("mkor.update"):
                # Reshaping calls other operators, which do not count.
                (y.T.reshape(-1) * 2).sum()
        x.neg()

    counts = summarize_counts([profile_once(work, "cpu"), profile_once(work, "cpu")])
    # Transposing, reshaping, multiplying, summing.
    assert counts.operators_in == {"step": 1, "mkor.update": 4}
    assert counts.operators == 6
    assert counts.kernels == 0
    assert {"aten::add", "aten::mul", "aten::neg"} <= {each.name for each in counts.slowest}


@pytest.mark.skipif(not native.in_use(), reason="there are no kernels")
def test_own_kernels_are_counted() -> None:
    """Those that a step takes, and no others; afterwards they are as they were."""
    before = native.loading.kernels()

    def work() -> None:
        native.finite(torch.ones(3))
        native.joint_norms((torch.ones(1, 2, 2), None))

    work()
    assert summarize_counts([profile_once(work, "cpu")]).own_calls == 2
    assert native.loading.kernels() is before
    assert summarize_counts([profile_once(lambda: None, "cpu")]).own_calls == 0


@pytest.mark.usefixtures("without_kernels")
def test_no_kernels_are_counted_where_there_are_none() -> None:
    found: list[bool] = []
    counts = summarize_counts([profile_once(lambda: found.append(native.in_use()), "cpu")])
    assert counts.own_calls == 0
    assert found == [False]


def test_memory_is_counted() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second + 1

    counts = summarize_counts([profile_once(work, "cpu")])
    assert counts.allocated_bytes == pytest.approx(4 * (1000 + 500 + 500), abs=16)
    assert counts.peak_bytes == pytest.approx(4 * 1500, abs=16)
    assert counts.allocations in range(3, 6)


def test_peak_is_that_of_the_running_sum() -> None:
    assert peak_of([]) == 0
    assert peak_of([-5, 3]) == 0
    assert peak_of([4, 4, -8, 6, 1, -3]) == 8


def test_counts_are_means() -> None:
    profiles = [Profile(1.0, 1.0, kernels=1, memory=[8]), Profile(1.0, 1.0, kernels=2)]
    counts = summarize_counts(profiles)
    assert (counts.kernels, counts.allocations, counts.peak_bytes) == (1.5, 0.5, 4)


def test_a_busy_machine_does_not_count_as_cpu_time() -> None:
    busy = Profile(cpu=1.0, wall=4.0, parts={"step": 2.0})
    assert busy.cpu_parts() == {"step": 0.5}
    # Several threads use more CPU time than there is wall time.
    assert Profile(cpu=3.0, wall=1.0, parts={"step": 2.0}).cpu_parts() == {"step": 2.0}


def test_work_of_every_tenth_step_is_profiled() -> None:
    subject = tiny("mlp")
    names = ("adamw", "mkor[update_every=10]+adamw")
    base, rare = summarize_all(
        run_all([parse_contestant(n) for n in names], subject, 2, Progress())
    )
    often = summarize_all([worker_timed("mkor+adamw", subject)])[0]
    update = "mkor.update"
    assert base.counts.operators_in.keys() == {"forward", "backward", "step"}
    assert 0 < rare.counts.operators_in[update] < often.counts.operators_in[update]
    assert rare.counts.operators_in["mkor.base_step"] == base.counts.operators_in["step"]
    assert rare.parts_wall_ms.keys() == rare.parts_ms.keys() > base.parts_ms.keys()
    assert rare.page_faults >= 0


def worker_timed(contestant: str, subject: Subject) -> Worker:
    made = worker(contestant, subject)
    made.timed()
    return made


def test_stages_are_timed_by_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter((float(i), 10.0 * i * i) for i in range(100))
    made = worker("sgd", tiny("mlp"))
    monkeypatch.setattr("mkor.bench.worker._clocks", lambda: next(clocks))
    # One reading before, four inside, one after.
    made.timed()
    assert made.cpu == [5.0]
    assert made.wall == [250.0]
    monkeypatch.setattr(Worker, "profiled_rounds", 0)
    assert made.parts() == {"forward": 1.0, "backward": 1.0, "step": 1.0}
    assert made.walls() == {"forward": 30.0, "backward": 50.0, "step": 70.0}


def test_on_a_gpu_the_wall_clock_counts() -> None:
    made = worker("sgd", tiny("mlp"))
    made.cpu, made.wall = [1.0], [2.0]
    assert made.times == [1.0]
    made.subject = Subject(**{**vars(made.subject), "device": "cuda"})
    assert made.times == [2.0]


def test_products_in_bfloat16() -> None:
    subject = Subject(**{**vars(tiny("mlp")), "autocast": torch.bfloat16})
    seen = []
    made = worker("mkor+sgd", subject)
    made.model[0].register_forward_hook(lambda _m, _x, output: seen.append(output.dtype))
    made.iterate()
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("kept", [True, False])
def test_memory_is_kept_where_the_library_can(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Library:
        def __init__(self, _: object) -> None:
            if kept:
                self.mallopt = lambda *pair: asked.append(pair) or 1

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    assert memory.keep_memory() == kept
    # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h.
    assert asked == ([(-1, -1), (-4, 0)] if kept else [])


def test_quartiles_of_one_value() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


# ----------------------------------------------------------------------------------------- limits


def test_layers_and_the_entries_they_use() -> None:
    """40 rows of which 2 x 3 make statistics; the output layer is left to the base."""
    subject = model_subject("mlp", {"width": 8, "depth": 2, "rows": 40})
    layers = layers_of(worker("mkor[rank=4,vectors=2,rows=3]+sgd", subject))
    assert [(e.d_out, e.d_in, e.bias, e.rank) for e in layers] == [(8, 8, True, 4)] * 2
    assert [e.used for e in layers] == [6 * 16] * 2
    # All rows where there are fewer.
    few = model_subject("mlp", {"width": 8, "depth": 2, "rows": 4})
    layers = layers_of(worker("mkor[rank=4,vectors=2,rows=3]+sgd", few))
    assert [e.used for e in layers] == [4 * 16] * 2


def test_convolutions_have_their_patches_as_columns() -> None:
    layers = layers_of(worker("mkor+sgd", tiny("conv-net")))
    assert (layers[0].d_out, layers[0].d_in, layers[0].bias) == (4, 27, False)
    # 3 images of 3 and 4 channels: of 3,072 rows in all 512 are used.
    assert layers[0].used == round(3 * 32 * 32 * (3 + 4) * 512 / 3072)


def test_least_work_of_one_layer() -> None:
    r, k, m, d, n = 4, 2, 3, 8, 40
    subject = model_subject("mlp", {"width": d, "depth": 1, "rows": n})
    base, made = (
        worker("adamw", subject),
        worker(f"mkor[rank={r},vectors={k},rows={m}]+adamw", subject),
    )
    work = least_work(made, base)
    weights = sum(p.numel() for p in base.model.parameters())
    assert work["mkor.capture"] == (4 * (k * m * 2 * d + 2 * k * d), 0)
    assert work["mkor.update"] == (4 * 2 * (2 * k * d + r * d + 2 * k * r), 2 * 2 * k * r * d)
    moved, operations = work["mkor.precondition"]
    assert moved == 4 * (2 * (r * d + r * r) + 2 * d * (d + 1))
    assert operations == pytest.approx(8 * r * d * (d + 1) + 2 * (2 * r**3 / 3 + 2 * r * r * d))
    # Weights, and AdamW's two averages, are read and written; gradients are read; three steps.
    moved, _ = work["mkor.base_step"]
    assert 4 * 7 * weights <= moved <= 4 * 7 * weights + 8 * 4 * len(list(base.model.parameters()))


def test_one_side_moves_less() -> None:
    subject = tiny("mlp")
    base = worker("adamw", subject)
    both, left = (
        least_work(worker(f"mkor[{o}]+adamw", subject), base)
        for o in ("rank=16", "sides=left,rank=16")
    )
    for part in ("mkor.capture", "mkor.update", "mkor.precondition"):
        assert left[part][0] < both[part][0]


def test_bounds_are_bytes_over_bandwidth_and_operations_over_speed() -> None:
    subject = tiny("mlp")
    base, made = worker_timed("adamw", subject), worker_timed("mkor+adamw", subject)
    _, timed = summarize_all([base, made])
    limits = {limit.part: limit for limit in limits_of(made, base, timed, MACHINE)}
    parts = ["capture", "measure", "update", "precondition", "base_step"]
    assert list(limits) == [f"mkor.{part}" for part in parts]
    for part, limit in limits.items():
        assert limit.bytes > 100
        assert limit.bytes_ms == pytest.approx(1e3 * MACHINE.moving(limit.bytes))
        assert limit.operations_ms == pytest.approx(1e3 * limit.operations / 2e6)
        assert limit.calls_ms == pytest.approx(500 * timed.counts.operators_in.get(part, 0))
        larger = max(limit.bytes_ms, limit.operations_ms)
        assert limit.near == pytest.approx(larger / timed.parts_ms[part])


def test_small_working_sets_have_a_bandwidth_of_their_own() -> None:
    assert MACHINE.moving(500) == 0.5
    assert MACHINE.moving(2000) == 0.002
    assert MACHINE.moving(10**13) == 10**7


def test_only_mkor_at_work_has_bounds() -> None:
    subject = tiny("mlp")
    assert has_limits(worker("mkor+sgd", subject))
    for name in ("sgd", "eva+sgd", "kfac+sgd", "mkor-h+sgd"):
        assert not has_limits(worker(name, subject))


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead_limits, "SECONDS", 0.0)
    monkeypatch.setattr(overhead_limits, "WORKING_SETS", (1 << 10, 1 << 12))
    monkeypatch.setattr(overhead_limits, "PRODUCT", 16)
    machine = measure_machine()
    assert machine.bandwidth.keys() == {1 << 10, 1 << 12}
    assert min(machine.operations, machine.call, *machine.bandwidth.values()) > 0


# ---------------------------------------------------------------------------------------- command


def test_the_command_prints_draws_and_stores_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead_limits, "SECONDS", 0.0)
    monkeypatch.setattr(overhead_limits, "WORKING_SETS", (1 << 10, 1 << 20))
    monkeypatch.setattr("mkor.bench.overhead.keep_memory", lambda: True)
    record, picture = tmp_path / "o.json", tmp_path / "o.png"
    sizes = ["--width", "8", "--depth", "1", "--batch", "2", "--context", "4", "--rounds", "2"]
    files = ["--json", str(record), "--plot", str(picture)]
    who = "adamw,mkor+adamw,eva+adamw"
    assert (
        main(["overhead", who, "--model", "transformer", *sizes, "--limits", "--quiet", *files])
        == 0
    )
    shown = capsys.readouterr().out
    for expected in (
        "operator calls",
        "page faults",
        "limits of mkor+adamw",
        "near",
        "peak memory",
    ):
        assert expected in shown
    assert "limits of eva" not in shown
    stored = json.loads(record.read_text(encoding="utf-8"))
    assert stored["model"]["name"] == "transformer"
    assert stored["memory_kept"] is True
    assert stored["environment"]["packages"]["torch"]
    assert stored["machine"]["operations"] > 0
    assert list(stored["limits"]) == ["mkor+adamw"]
    assert all(limit["near"] > 0 for limit in stored["limits"]["mkor+adamw"])
    base, wrapped, _ = stored["timings"]
    assert wrapped["counts"]["operators"] > base["counts"]["operators"] > 0
    # The block's six layers: 16 sums of rows 8 or 32 wide on either side, and a number per layer.
    widths = 4 * (8 + 8) + 2 * (8 + 32)
    assert wrapped["buffer_bytes"] >= 4 * (16 * widths + 6 * (3 + 16))
    assert base["buffer_bytes"] == 0
    assert (wrapped["counts"]["own_calls"] > 0) == native.in_use()
    assert wrapped["counts"]["slowest"][0]["name"].startswith("aten::")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_without_limits_nothing_of_the_machine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkor.bench.overhead.measure_machine", None)
    monkeypatch.setattr("mkor.bench.overhead.keep_memory", lambda: False)
    path = tmp_path / "o.json"
    sizes = ["--width", "8", "--depth", "1", "--rows", "4", "--rounds", "1"]
    assert main(["overhead", "sgd", *sizes, "--quiet", "--json", str(path)]) == 0
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["machine"] is None
    assert stored["limits"] == {}
    assert [each.name for each in tmp_path.iterdir()] == ["o.json"]
