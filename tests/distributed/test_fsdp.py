"""``fully_shard`` on 1, 2 and 3 processes: equal to one process on the whole batch."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import mkor
from support.alike import assert_effective, assert_equal, assert_in_step
from support.launches import launches_of
from support.nets import Apart, Attention, Columns, ConvNet, Small, Tokens, TwoDtypes
from support.parallel import DENSE, EVERY, F32, LONG, WHOLE, Case, base_of, reference, train
from support.toy import toy

SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.5, patience=0.0, warmup=3, every=2)
CHUNKS = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9}
ONLY_EXTRA = {"skip": ["first", "again", "narrow", "output"]}
LAYERS = {"children": True}
SWAPPED = {"order": "MKOR first"}


TOY = {"skip_output": False}
EXACT = {
    "linear, float32": Case(dtype=F32, steps=LONG),
    "linear": Case(setup=LAYERS, steps=LONG),
    "convolutions, float32": Case(ConvNet, dtype=F32, steps=LONG),
    "convolutions": Case(ConvNet, every="uneven", setup=LAYERS, steps=LONG),
    "transposed": Case(Tokens, every="uneven", steps=LONG),
    "transposed, one side": Case(Tokens, options=WHOLE | {"sides": "right"}),
    "columns": Case(Small, setup={"columns": True}, every="uneven"),
    "columns, convolutions": Case(Columns, setup={"columns": True}, every="uneven"),
    "columns, convolutions, shards on a 2-D mesh": Case(
        Columns, setup={"columns": True, "mesh": "shards"}
    ),
    "columns, KFAC": Case(
        Small, wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, setup={"columns": True}
    ),
    "columns, dense": Case(Small, wrap=mkor.DenseMKOR, options=DENSE, setup={"columns": True}),
    "over AdamW": Case(base="adamw", every="uneven"),
    "over fused AdamW": Case(base="adamw", setup={"fused": True}),
    "evaluated and asked before each step": Case(setup={"evaluate": True, "reshard": False}),
    "a mesh of its own": Case(setup={"mesh": "own"}),
    "swapped": Case(setup=SWAPPED, every="uneven"),
    "each layer on its own, swapped": Case(Tokens, setup=SWAPPED | LAYERS, base="adamw"),
    "not resharded, dropped passes": Case(setup=LAYERS | {"reshard": False}, micro=2, dropped=True),
    "replicas": Case(setup={"mesh": "replicas"}, every="uneven"),
    "shards on a 2-D mesh": Case(setup={"mesh": "shards"}, every="uneven"),
    "shards on a 2-D mesh, swapped": Case(setup=SWAPPED | {"mesh": "shards"}, micro=2),
    "accumulation": Case(micro=2, every="uneven", setup=LAYERS, steps=LONG),
    "accumulation, always reduced": Case(micro=2, eager_sync=True),
    "a lonely layer": Case(every="lonely", setup=LAYERS, steps=LONG),
    "only a lonely layer": Case(options=WHOLE | ONLY_EXTRA, every="lonely", micro=2),
    "only a lonely layer, always reduced": Case(
        options=WHOLE | ONLY_EXTRA, every="lonely", micro=2, eager_sync=True
    ),
    "attention": Case(Attention, every="uneven"),
    "two dtypes": Case(TwoDtypes, every="uneven", dtype=F32, setup=LAYERS),
    "uneven last batches": Case(every="uneven", now_and_then="few"),
    "a process without rows": Case(every="uneven", now_and_then="none"),
    "a process without rows, convolutions": Case(ConvNet, now_and_then="none"),
    "fewer passes later, always reduced": Case(micro=2, micro_later=1, eager_sync=True),
    "another number of passes later": Case(micro=1, micro_later=2, every="uneven"),
    "a layer added before a step": Case(added=3),
    "a closure": Case(closure=True),
    "clipped": Case(clip=True, every="uneven"),
    "every other step": Case(options=WHOLE | {"update_every": 2}, every="uneven"),
    "clipped by kl": Case(options=WHOLE | {"rescale": None, "kl_clip": 1e-4}, every="uneven"),
    "left side, rescaled each step": Case(
        options=WHOLE | {"sides": "left", "rescale": "step"}, every="uneven"
    ),
    "right side, not rescaled": Case(
        options=WHOLE | {"sides": "right", "rescale": None}, every="uneven"
    ),
    "output left out": Case(options=WHOLE | {"skip_output": True}, every="uneven"),
    "dense": Case(wrap=mkor.DenseMKOR, options=DENSE, every="uneven"),
    "dense, left side": Case(
        wrap=mkor.DenseMKOR,
        options=DENSE | {"sides": "left", "rule": "exact"},
    ),
    "KFAC": Case(wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, every="uneven"),
    "KFAC, convolutions": Case(ConvNet, wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, micro=2),
    "KFAC, transposed": Case(Tokens, wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}),
    "Eva": Case(wrap=mkor.Eva, options=EVERY | {"damping": 3e-3}, every="uneven"),
    "Eva, transposed, running": Case(
        Tokens,
        wrap=mkor.Eva,
        options=EVERY | {"damping": 1e-4, "kl_clip": None, "rescale": "running"},
    ),
    "own curvature": Case(wrap=toy, options=TOY, every="uneven"),
    "own curvature, columns": Case(Small, wrap=toy, options=TOY, setup={"columns": True}),
    "hybrid": Case(options=WHOLE | {"hybrid": SWITCH}, steps=LONG),
    "overflow on one process": Case(dtype=F32, bad=3, spoilt=1e30),
    "NaN, skipped": Case(options=WHOLE | {"nonfinite": "skip"}, every="uneven", bad=3),
    "NaN in one shard, skipped": Case(Apart, options=WHOLE | {"nonfinite": "skip"}, bad=3),
    "NaN in one shard, replicas": Case(
        Apart, options=WHOLE | {"nonfinite": "skip"}, bad=3, setup={"mesh": "replicas"}
    ),
}
COMPILE = {"compiled": Case(Small, setup={"compile": True}, every="uneven", steps=4)}
IN_STEP = {
    "more passes later, always reduced": Case(micro=1, micro_later=2, eager_sync=True),
    "only a lonely layer, more passes later": Case(
        options=WHOLE | ONLY_EXTRA,
        every="lonely",
        micro_later=2,
        eager_sync=True,
    ),
    "chunks": Case(options=CHUNKS, every="uneven", now_and_then="none"),
    "mixed precision": Case(setup={"mixed": True}, dtype=F32, micro=2),
    "mixed precision, KFAC": Case(
        wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, setup={"mixed": True}, dtype=F32
    ),
}
NAN = {
    "NaN, propagated": Case(bad=4, every="uneven"),
    "NaN in one shard, propagated": Case(Apart, bad=4),
}
CASES = EXACT | COMPILE | IN_STEP | NAN
ON_ONE = {"linear", "convolutions", "swapped", "accumulation", "KFAC", "mixed precision"}
"""What one process in a group runs, too."""
ON_THREE = {
    "linear",
    "convolutions",
    "transposed",
    "swapped",
    "replicas",
    "shards on a 2-D mesh",
    "accumulation, always reduced",
    "only a lonely layer, always reduced",
    "uneven last batches",
    "a process without rows",
    "dense",
    "KFAC",
    "Eva",
    "hybrid",
    "NaN in one shard, skipped",
    "chunks",
}
"""What three processes run, too; two run everything."""


def pairs(names):
    """Numbers of processes, and cases."""
    chosen = {1: ON_ONE, 2: CASES, 3: ON_THREE}
    return [(world, name) for world in chosen for name in names if name in chosen[world]]


def mesh_of(kind, world):
    if kind == "own":
        return DeviceMesh.from_group(torch.distributed.new_group(), "cpu")
    if kind == "one":
        return init_device_mesh("cpu", (world,))
    shape = (world, 1) if kind == "replicas" else (1, world)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def shard(net, *, mesh="one", children=False, reshard=True, mixed=False, columns=False):
    """Cut the model's parameters up, each layer's in its own group or all in one."""
    world = torch.distributed.get_world_size()
    how = {"mesh": mesh_of(mesh, world), "reshard_after_forward": reshard}
    if mixed:
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if columns:
        how["shard_placement_fn"] = lambda p: Shard(1) if p.dim() > 1 else Shard(0)
    for child in net.children() if children else ():
        fully_shard(child, **how)
    fully_shard(net, **how)


def swap_parameters(optimizer, net, shard_it):
    """What Accelerate does with an optimizer of parameters that are about to be sharded."""
    names = {p.data_ptr(): name for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
            group["params"][i].data_ptr = p.data_ptr()
    shard_it()
    new = dict(net.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[p.data_ptr]] for p in group["params"]]


@torch.no_grad()
def look(net, optimizer):
    """A forward pass alone leaves whole weights in the modules, until somebody asks."""
    net(net.rows(2)[0], True)
    assert len(optimizer.coverage()) > 1


def sharded(case: Case, net: nn.Module):
    """The sharded model and its wrapper, built before or after that."""
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)  # of Conv1D
    how = {"order": "shards first", "compile": False, "evaluate": False} | case.setup
    order, compiled, evaluate = (how.pop(key) for key in ("order", "compile", "evaluate"))
    if how.pop("fused", False):
        case = dataclasses.replace(case, base="adamw-fused")
    net.touch = True  # FSDP2 itself needs every layer to take part on every process
    if order == "shards first":
        shard(net, **how)
    optimizer = case.wrap(net, base_of(case, net), **case.options)
    if evaluate:
        optimizer.register_step_pre_hook(lambda *_: look(net, optimizer))
    if order != "shards first":
        swap_parameters(optimizer, net, lambda: shard(net, **how))
    return torch.compile(net, backend="aot_eager") if compiled else net, optimizer


def run(place, name):
    """A process' part of a case."""
    if name in COMPILE:
        torch._dynamo.reset()
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    return train(CASES[name], sharded, place.rank, place.world)


_launches = launches_of(run)


@pytest.mark.parametrize(("world", "name"), pairs(EXACT | COMPILE))
def test_equals_one_process_on_the_whole_batch(launches, world, name):
    """Neither the shares of the batch nor the shards of the weights make a difference."""
    values = launches(world)[name]
    expected = reference(CASES, name)
    assert_in_step(values)
    assert_equal(values[0], expected, CASES[name].dtype)
    assert_effective(expected)


@pytest.mark.parametrize(("world", "name"), pairs(IN_STEP))
def test_processes_stay_in_step(launches, world, name):
    """What rounding or chunks of rows make different from one process is the same on all."""
    values = launches(world)[name]
    assert_in_step(values)
    weights = values[0]["weights"]
    assert weights.isfinite().all()
    assert (weights[-1] - weights[0]).norm() > 0.03


@pytest.mark.parametrize(("world", "name"), pairs([name for name in EXACT if "NaN" in name]))
def test_one_process_with_nan_is_skipped_by_all(launches, world, name):
    """It costs every process that update and that step, and nothing else."""
    bad = CASES[name].bad
    for value in launches(world)[name]:
        weights, figures = value["weights"], value["figures"]
        assert torch.equal(weights[bad + 1], weights[bad])
        assert not torch.equal(weights[bad + 2], weights[bad + 1])
        assert figures["mkor/skipped_steps"] == 1
        assert figures["mkor/refused_updates"] > 0


@pytest.mark.parametrize(("world", "name"), pairs(NAN))
def test_nan_of_one_process_reaches_no_factor(launches, world, name):
    """The weights go the way they go without a wrapper; the factors stay finite, everywhere."""
    values = launches(world)[name]
    assert_in_step(values)
    for value in values:
        assert not value["weights"][CASES[name].bad + 1].isfinite().all()
        assert value["figures"]["mkor/refused_updates"] > 0
    expected = reference(CASES, name)["weights"]
    close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
    torch.testing.assert_close(values[0]["weights"], expected, **close)


@pytest.mark.parametrize(("world", "name"), pairs(["hybrid"]))
def test_hybrid_switches_alike(launches, world, name):
    """Each process knows its own losses only; all switch after the step at which one would."""
    expected = reference(CASES, name)["switched at"]
    assert 3 < expected < LONG
    assert [value["switched at"] for value in launches(world)[name]] == [expected] * world
