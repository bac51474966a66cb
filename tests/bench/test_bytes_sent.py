"""``mkor overhead --processes``: counted are the bytes that collectives take, as by formula."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from mkor.bench.bytes_sent import collectives, formula, period
from mkor.bench.cli import UsageError, main
from mkor.bench.contestants import parse_contestant


@pytest.mark.parametrize(
    ("text", "processes", "kinds", "steps"),
    [
        ("adamw", 2, {}, 1),
        ("mkor[vectors=4]+adamw", 2, {"statistics": 4 * 8}, 1),
        ("mkor[vectors=4,sides=left]+adamw", 2, {"statistics": 4 * 3}, 1),
        ("mkor[vectors=4,update_every=2]+adamw", 2, {"statistics": 2 * 8}, 2),
        ("mkor[vectors=4,reduce='gather']+adamw", 3, {"statistics": 2 * 8}, 1),
        ("dense-mkor[update_every=1]+adamw", 2, {"statistics": 8}, 1),
        ("eva+adamw", 2, {"statistics": 8}, 1),
        ("kfac+adamw", 2, {"statistics": 34, "inverses": 17}, 1),
        ("kfac[inverse_every=2]+adamw", 2, {"statistics": 34, "inverses": 8.5}, 2),
        (
            "kfac[grad_worker_fraction=0.5]+adamw",
            4,
            {"statistics": 34, "inverses": 8.5, "preconditioned": 7.5},
            1,
        ),
    ],
)
def test_formulas(text, processes, kinds, steps):
    contestant = parse_contestant(text)
    assert formula(contestant, [(3, 5)], processes) == kinds
    assert period(contestant) == steps


def test_bert_sends_below_a_hundredth_of_its_gradients():
    layers = [(768, 769)] * 4 + [(3072, 769), (768, 3073)]
    (sent,) = formula(parse_contestant("mkor[vectors=4]+adamw"), layers, 2).values()
    assert sent < 0.0079 * sum(d_out * d_in for d_out, d_in in layers)


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
    with collectives() as seen:
        call()
    assert [(each.kind, each.handed, each.wire) for each in seen] == [("gradients", handed, wire)]


def test_kinds_show_in_groups_and_ranges(four):
    with collectives() as seen:
        dist.all_reduce(tensor(1))
        dist.all_reduce(tensor(2), group=four)
        for number, name in enumerate(("reduce", "update", "precondition", "base_step"), start=3):
            with record_function("Optimizer.step#MKOR.step"), record_function(f"mkor.{name}"):
                dist.all_reduce(tensor(number))
        with record_function("mkor.update"), record_function("inner"):
            pass
        dist.broadcast(tensor(7), 3, group=four)
        dist.barrier()
    kinds = ["gradients", "statistics", "statistics", "inverses", "preconditioned", "other"]
    assert [(each.kind, each.handed // 4) for each in seen] == [
        *zip(kinds, range(1, 7), strict=True),
        ("statistics", 7),
    ]


def test_unknown_collectives_are_not_passed_over(four):
    message = r"cannot count what c10d::alltoall_base_ sends; choose .* allreduce_,"
    with collectives(), pytest.raises(UsageError, match=message):
        dist.all_to_all_single(tensor(4), tensor(4))


# ------------------------------------------------------------------------------------- the command


def test_counted_bytes_are_those_of_the_formula(tmp_path, capsys):
    path = tmp_path / "found.json"
    labels = ["adamw", "mkor[vectors=2,skip_output=false]+adamw"]
    labels += ["eva[skip_output=false]+adamw", "kfac[grad_worker_fraction=0.5]+adamw"]
    command = ["overhead", ",".join(labels), "--processes", "2", "--quiet"]
    command += ["--width", "48", "--depth", "2", "--rows", "32", "--json", str(path)]
    assert main(command) == 0
    assert "beside gradients" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["processes"] == 2
    found = {each["contestant"]: each for each in record["contestants"]}
    assert list(found) == labels
    for each in found.values():
        assert each["gradients"] == each["kinds"]["gradients"] == 4 * (2 * 48 * 49 + 16 * 49)
    base, window, eva, kfac = found.values()
    assert base["kinds"].keys() == {"gradients"}
    assert base["calls"] == 1
    for each in (window, eva):
        assert each["layers"] == [[48, 49], [48, 49], [16, 49]]
        # Beside the vectors, counts of rows and two sums of squares for each layer.
        beyond = each["kinds"]["statistics"] - each["formula"]["statistics"]
        assert 0 <= beyond <= 4 * 8 * 3
        assert each["calls"] == 2
    assert window["formula"]["statistics"] == 2 * eva["formula"]["statistics"]
    # Half of the layers' gradients, and flags of what is shared.
    assert 0 <= kfac["kinds"]["preconditioned"] - kfac["formula"]["preconditioned"] <= 4 * 8


@pytest.mark.parametrize("words", [["--plot", "x.png"], ["--bf16"], ["--rounds", "3"]])
def test_options_of_the_timing_are_refused(words, capsys):
    assert main(["overhead", "--processes", "2", *words]) == 2
    assert f"takes no {words[0]}" in capsys.readouterr().err


def test_a_failing_process_is_told_and_none_stays(capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert main(["overhead", "sgd", "--processes", "2", "--width", "8", "--rows", "4"]) == 2
    assert "a process failed" in capsys.readouterr().err
    assert torch.multiprocessing.active_children() == []
