"""``mkor overhead --processes``: what is counted is what is sent, and what the theory says."""

import json
import os
import socket
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from mkor.bench.cli import main
from mkor.bench.contestants import parse_contestant
from mkor.bench.errors import UsageError
from mkor.bench.processes_count import Counter, bytes_of, counted, kernel_bytes, wire_bytes
from mkor.bench.processes_launch import run_together
from mkor.bench.processes_theory import LayerSize, expected, formula, period
from processes import Forking

BERT_LAYER = [LayerSize(768, 769)] * 4 + [LayerSize(3072, 769), LayerSize(768, 3073)]

# ----------------------------------------------------------------------------------------- theory


def numbers(text, processes, sizes):
    return dict(expected(parse_contestant(text), sizes, processes))


@pytest.mark.parametrize(
    ("text", "processes", "kinds"),
    [
        ("adamw", 2, {}),
        ("mkor[vectors=4]+adamw", 2, {"statistics": 4 * 8}),
        ("mkor[vectors=4,sides=left]+adamw", 2, {"statistics": 4 * 3}),
        ("mkor[vectors=4,update_every=2]+adamw", 2, {"statistics": 2 * 8}),
        ("mkor[vectors=4,reduce='gather']+adamw", 3, {"statistics": 2 * 8}),
        ("dense-mkor[update_every=1]+adamw", 2, {"statistics": 8}),
        ("eva+adamw", 2, {"statistics": 8}),
        ("kfac+adamw", 2, {"statistics": 34, "inverses": 17}),
        ("kfac[inverse_every=2]+adamw", 2, {"statistics": 34, "inverses": 8.5}),
        ("kfac[grad_worker_fraction=0.5]+adamw", 2, {"statistics": 34, "preconditioned": 7.5}),
        (
            "kfac[grad_worker_fraction=0.5]+adamw",
            4,
            {"statistics": 34, "inverses": 8.5, "preconditioned": 7.5},
        ),
    ],
)
def test_theory(text, processes, kinds):
    assert numbers(text, processes, [LayerSize(3, 5)]) == kinds


def test_bert_sends_below_a_hundredth_of_its_gradients():
    (sent,) = numbers("mkor[vectors=4]+adamw", 2, BERT_LAYER).values()
    assert sent < 0.0079 * sum(size.weights for size in BERT_LAYER)


@pytest.mark.parametrize(
    ("text", "words", "steps"),
    [
        ("adamw", "", 1),
        ("mkor+adamw", "16 (d_in + d_out)", 1),
        ("eva+adamw", "d_in + d_out", 1),
        ("dense-mkor+adamw", "d_in + d_out", 10),
        (
            "kfac[grad_worker_fraction=0.5,inverse_every=3]+adamw",
            "d_in^2 + d_out^2 + (d_in^2 + d_out^2)/4 + 2/4 d_in d_out",
            3,
        ),
    ],
)
def test_formula_and_period(text, words, steps):
    assert formula(parse_contestant(text), 4) == words
    assert period(parse_contestant(text)) == steps


# ---------------------------------------------------------------------------------------- counting


@pytest.fixture(name="four")
def _four():
    """Collectives of the last of four processes that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield dist.new_group([2, 3])
    dist.destroy_process_group()


def tensor(size):
    return torch.zeros(size)


# The newest torch has other names for two of them.
@pytest.mark.filterwarnings("ignore:.*is deprecated. Please use:FutureWarning")
@pytest.mark.parametrize(
    ("call", "handed", "wire"),
    [
        (lambda: dist.all_reduce(tensor(8)), 32, 48),
        (lambda: dist.broadcast(tensor(8), 3), 32, 24),
        (lambda: dist.broadcast(tensor(8), 0), 0, 24),
        (lambda: dist.all_gather_into_tensor(tensor(32), tensor(8)), 32, 96),
        (lambda: dist.all_gather([tensor(8) for _ in range(4)], tensor(8)), 32, 96),
        (lambda: dist.reduce_scatter_tensor(tensor(2), tensor(8)), 32, 24),
        (lambda: dist.reduce_scatter(tensor(2), [tensor(2) for _ in range(4)]), 32, 24),
    ],
    ids=["sum", "broadcast", "receive", "gather", "gather list", "scatter", "scatter list"],
)
def test_bytes_of_collectives(four, call, handed, wire):
    (seen,) = counted(call, 1)
    assert (seen.kind, seen.handed, seen.wire) == ("gradients", handed, wire)


def test_kinds_show_in_groups_and_ranges(four):
    def step():
        dist.all_reduce(tensor(1))
        dist.all_reduce(tensor(2), group=four)
        for number, name in enumerate(("reduce", "update", "precondition", "base_step"), start=3):
            with record_function("Optimizer.step#MKOR.step"), record_function(f"mkor.{name}"):
                dist.all_reduce(tensor(number))
        with record_function("mkor.update"), record_function("inner"):
            pass
        dist.broadcast(tensor(7), 3, group=four)
        dist.barrier()

    found = [(each.kind, each.handed // 4) for each in counted(step, 2)]
    kinds = ["gradients", "statistics", "statistics", "inverses", "preconditioned", "other"]
    one = [*zip(kinds, range(1, 7), strict=True), ("statistics", 7)]
    assert found == 2 * one


def test_unknown_collectives_are_not_passed_over(four):
    message = r"cannot count what c10d::alltoall_base_ sends; choose .* allreduce_,"
    with Counter(), pytest.raises(UsageError, match=message):
        dist.all_to_all_single(tensor(4), tensor(4))


def test_sizes():
    assert bytes_of([[tensor(2), tensor(3).double()], tensor(1).bfloat16()]) == 34
    assert bytes_of(None) == 0
    assert wire_bytes("allreduce_", 30, 3) == 40


def test_a_kernel_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernel_bytes(0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_kernel_counts_what_was_sent():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        one = socket.create_connection(("127.0.0.1", port))
        with closing(one), closing(server.accept()[0]) as other:
            before, without = kernel_bytes(0), kernel_bytes(port)
            one.sendall(bytes(1000))
            other.sendall(bytes(10))
            assert kernel_bytes(0) - before == 1010
            assert kernel_bytes(port) == without


# ------------------------------------------------------------------------------------ the command


def test_counted_bytes_are_those_of_the_theory(tmp_path, capsys):
    path = tmp_path / "found.json"
    contestants = [
        "adamw",
        "mkor[vectors=2]+adamw",
        "eva+adamw",
        "kfac+adamw",
        "kfac[grad_worker_fraction=0.5]+adamw",
    ]
    command = ["overhead", ",".join(contestants), "--processes", "2", "--quiet"]
    command += ["--width", "48", "--depth", "2", "--rows", "32", "--json", str(path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 x 48 x 49" in printed
    assert "beside gradients" in printed
    record = json.loads(path.read_text())
    assert record["processes"] == 2
    found = {each["contestant"]: each for each in record["contestants"]}
    assert list(found) == contestants
    weights = 2 * 48 * 49 + 16 * 49
    for each in found.values():
        assert each["gradients"] == each["kinds"]["gradients"] == 4 * weights
        assert each["kernel"] is None or 1 <= each["kernel"] / each["wire"] < 1.1
        for layer in each["layers"]:
            # Counts of rows and two sums of squares; flags of what is shared.
            assert 0 <= layer["counted"] - layer["theory"] <= 4 * 6
    kinds = {name: {k for k, size in each["kinds"].items() if size} for name, each in found.items()}
    common = {"gradients", "statistics"}
    assert kinds["adamw"] == {"gradients"}
    assert kinds["mkor[vectors=2]+adamw"] == kinds["eva+adamw"] == common
    assert kinds["kfac+adamw"] == common | {"inverses"}
    assert "preconditioned" in kinds["kfac[grad_worker_fraction=0.5]+adamw"]
    share = found["mkor[vectors=2]+adamw"]
    assert share["share"] == share["kinds"]["statistics"] / share["gradients"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "3"], "takes no rounds"),
        (["--scaling"], "takes no scaling"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--json", "."], "this is a folder"),
        (["--model", "mlpp"], "unknown model"),
        (["--model", "bert-base-shapes", "--batch", "3"], "has no --batch"),
        (["--model", "bert-base-shapes", "--depth", "1", "--width", "8", "adamv"], "adamv"),
    ],
)
def test_wrong_requests(arguments, message, capsys):
    contestants = [arguments.pop()] if arguments[-1] == "adamv" else []
    assert main(["overhead", *contestants, "--processes", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------- processes


@pytest.fixture(name="forked")
def _forked(monkeypatch):
    """What ends processes does not ask how they were started."""
    monkeypatch.setattr("mkor.bench.processes_launch.mp", Forking())


def note(folder):
    (Path(folder) / str(os.getpid())).touch()


def one_fails(place, task, say):
    folder, how = task
    note(folder)
    say("here")
    place.meet()
    if place.rank == 0 or how == "waits":
        time.sleep(1000)
    if how == "raises":
        raise ArithmeticError("of its own")
    os._exit(3)


def alive(folder):
    return [path.name for path in folder.iterdir() if Path("/proc", path.name).exists()]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("how", "message"), [("raises", "of its own"), ("exits", "process 1 ended without a result")]
)
def test_a_failing_process_ends_all(how, message, tmp_path):
    heard = []
    with pytest.raises(UsageError, match=message):
        run_together(one_fails, 2, (str(tmp_path), how), heard.append, 100.0)
    assert heard == ["here"]
    assert len(list(tmp_path.iterdir())) == 2
    assert not alive(tmp_path)


@pytest.mark.usefixtures("forked")
def test_time_is_bounded(tmp_path):
    start = time.monotonic()
    with pytest.raises(UsageError, match="too long"):
        run_together(one_fails, 2, (str(tmp_path), "waits"), print, 0.5)
    assert time.monotonic() - start < 20
    assert not alive(tmp_path)
