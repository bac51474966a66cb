"""DistributedDataParallel on 1, 2 and 3 processes: equal to one process on the whole batch."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.alike import assert_effective, assert_equal, assert_in_step
from support.launches import launches_of
from support.nets import Attention, ConvNet, Heads, Mlp, Small, Tokens, TwoDtypes
from support.parallel import DENSE, EVERY, F32, LONG, SHORT, WHOLE, Case, base_of, reference, train

LONELY = {"find_unused_parameters": True}
CHUNKS = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.5, patience=0.0, warmup=3, every=2)
ONLY_EXTRA = {"skip": ["first", "again", "narrow", "output"]}

EXACT = {
    "linear, float32": Case(dtype=F32, steps=LONG),
    "linear": Case(steps=LONG),
    "convolutions, float32": Case(ConvNet, dtype=F32, steps=LONG),
    "convolutions": Case(ConvNet, every="uneven", steps=LONG),
    "transposed": Case(Tokens, every="uneven", steps=LONG),
    "over AdamW": Case(base="adamw", every="uneven"),
    "DDP first": Case(setup={"order": "DDP first"}),
    "DDP first, wrapped as a whole": Case(setup={"order": "whole"}),
    "views into buckets": Case(setup={"gradient_as_bucket_view": True}, every="uneven"),
    "static graph": Case(setup={"static_graph": True}),
    "accumulation": Case(micro=3, every="uneven", steps=LONG),
    "other numbers of micro-batches, dropped passes": Case(micro=0, every="uneven", dropped=True),
    "accumulation, always reduced": Case(micro=2, eager_sync=True),
    "a lonely layer": Case(every="lonely", setup=LONELY, steps=LONG),
    "a lonely layer, accumulation": Case(every="lonely", setup=LONELY, micro=2),
    "a lonely layer without rows": Case(every="lonely", setup={"touch": True}),
    "only a lonely layer": Case(options=WHOLE | ONLY_EXTRA, every="lonely", setup=LONELY, micro=2),
    "only a lonely layer, always reduced": Case(
        options=WHOLE | ONLY_EXTRA, every="lonely", setup=LONELY, micro=2, eager_sync=True
    ),
    "heads of their own": Case(
        Heads, options=WHOLE | {"skip_output": True}, every="lonely", setup=LONELY
    ),
    "attention": Case(Attention, every="uneven"),
    "two dtypes": Case(TwoDtypes, every="uneven", dtype=F32),
    "uneven last batches": Case(every="uneven", now_and_then="few", period=5, steps=LONG),
    "a process without rows": Case(every="uneven", now_and_then="none"),
    "a process without rows, convolutions": Case(ConvNet, now_and_then="none"),
    "a process that never has rows": Case(every="none", now_and_then="none"),
    "fewer passes later, always reduced": Case(micro=2, micro_later=1, eager_sync=True),
    "another number of passes later": Case(micro=1, micro_later=2, every="uneven"),
    "a layer added before a step": Case(added=3),
    "a closure": Case(closure=True),
    "every other step": Case(options=WHOLE | {"update_every": 2}, every="uneven"),
    "every third step, accumulation": Case(options=WHOLE | {"update_every": 3}, micro=2),
    "clipped by kl": Case(options=WHOLE | {"rescale": None, "kl_clip": 1e-4}, every="uneven"),
    "left side, rescaled each step": Case(
        options=WHOLE | {"sides": "left", "rescale": "step"}, every="uneven"
    ),
    "right side, not rescaled": Case(
        options=WHOLE | {"sides": "right", "rescale": None}, every="uneven"
    ),
    "output left out, clipped": Case(
        options=WHOLE | {"skip_output": True}, clip=True, every="uneven"
    ),
    "a group of its own": Case(setup={"group": True}),
    "dense": Case(wrap=mkor.DenseMKOR, options=DENSE, every="uneven"),
    "dense, exact": Case(
        wrap=mkor.DenseMKOR, options=DENSE | {"update_every": 2, "rule": "exact"}, micro=2
    ),
    "KFAC": Case(wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, every="uneven"),
    "KFAC, convolutions": Case(ConvNet, wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, micro=2),
    "Eva": Case(wrap=mkor.Eva, options=EVERY | {"damping": 3e-3}, every="uneven"),
    "Eva, running": Case(
        wrap=mkor.Eva,
        options=EVERY | {"damping": 3e-3, "kl_clip": None, "rescale": "running"},
        micro=2,
    ),
    "hybrid": Case(options=WHOLE | {"hybrid": SWITCH}, steps=LONG),
    "overflow on one process": Case(dtype=F32, bad=3, spoilt=1e30),
    "NaN, skipped": Case(options=WHOLE | {"nonfinite": "skip"}, every="uneven", bad=3),
}
COMPILE = {
    "compiled inside": Case(Small, setup={"compile": "inside"}, every="uneven", steps=4),
    "compiled outside": Case(
        Small, setup={"compile": "outside"}, options=WHOLE | {"skip_output": True}, steps=4
    ),
}
IN_STEP = {
    "more passes later, always reduced": Case(micro=1, micro_later=2, eager_sync=True),
    "only a lonely layer, more passes later": Case(
        options=WHOLE | ONLY_EXTRA,
        every="lonely",
        micro_later=2,
        eager_sync=True,
        setup=LONELY,
    ),
    "chunks": Case(options=CHUNKS),
    "chunks, uneven": Case(options=CHUNKS, every="uneven", now_and_then="none"),
    "chunks, a lonely layer": Case(options=CHUNKS, every="lonely", setup=LONELY),
    "chunks, skipped": Case(options=CHUNKS | {"nonfinite": "skip"}, bad=3),
}
NAN = {
    "NaN, propagated": Case(bad=4, every="uneven"),
    "NaN, propagated, KFAC": Case(wrap=mkor.KFAC, options=EVERY | {"damping": 0.1}, bad=4),
}
CASES = EXACT | COMPILE | IN_STEP | NAN
ON_ONE = {"linear", "convolutions", "accumulation", "DDP first", "KFAC"}
"""What one process in a group runs, too."""
ON_THREE = {
    "linear",
    "convolutions, float32",
    "accumulation",
    "other numbers of micro-batches, dropped passes",
    "a lonely layer",
    "only a lonely layer, always reduced",
    "heads of their own",
    "uneven last batches",
    "a process without rows, convolutions",
    "a process that never has rows",
    "dense",
    "KFAC",
    "Eva",
    "hybrid",
    "NaN, skipped",
    "NaN, propagated",
    "chunks, uneven",
}
"""What three processes run, too; two run everything."""


def pairs(names):
    """Numbers of processes, and cases."""
    chosen = {1: ON_ONE, 2: CASES, 3: ON_THREE}
    return [(world, name) for world in chosen for name in names if name in chosen[world]]


def distributed(case: Case, net: nn.Module):
    """The model under DDP, and the wrapper built before or after that."""
    how = {"order": "MKOR first", "compile": None, "touch": False, "group": False} | case.setup
    order, compiled, touch, group = (how.pop(k) for k in ("order", "compile", "touch", "group"))
    net.touch = touch
    options = case.options
    if group:
        options = options | {"process_group": torch.distributed.new_group()}

    def wrap(model):
        return case.wrap(model, base_of(case, net), **options)

    optimizer = wrap(net) if order == "MKOR first" else None
    inner = torch.compile(net, backend="aot_eager") if compiled == "inside" else net
    model = DistributedDataParallel(inner, **how)
    if order != "MKOR first":
        optimizer = wrap(model if order == "whole" else net)
    if compiled == "outside":
        model = torch.compile(model, backend="aot_eager")
    return model, optimizer


def run(place, name):
    """A process' part of a case."""
    if name in COMPILE:
        torch._dynamo.reset()
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    return train(CASES[name], distributed, place.rank, place.world)


_launches = launches_of(run)


@pytest.mark.parametrize(("world", "name"), pairs(EXACT | COMPILE))
def test_equals_one_process_on_the_whole_batch(launches, world, name):
    """With one mean over all rows, how the batch is shared out makes no difference."""
    values = launches(world)[name]
    expected = reference(CASES, name)
    assert_in_step(values)
    assert_equal(values[0], expected, CASES[name].dtype)
    assert_effective(expected)


@pytest.mark.parametrize(("world", "name"), pairs(IN_STEP))
def test_processes_stay_in_step(launches, world, name):
    """Chunks of rows differ from those of one process, but not between processes."""
    values = launches(world)[name]
    assert_in_step(values)
    assert values[0]["weights"].isfinite().all()


@pytest.mark.parametrize(("world", "name"), pairs(["NaN, skipped", "chunks, skipped"]))
def test_one_process_with_nan_is_skipped_by_all(launches, world, name):
    """It costs every process that update and that step, and nothing else."""
    bad = CASES[name].bad
    for value in launches(world)[name]:
        weights, figures = value["weights"], value["figures"]
        assert torch.equal(weights[bad + 1], weights[bad])
        assert not torch.equal(weights[bad + 2], weights[bad + 1])
        assert figures["mkor/skipped_steps"] == 1
        assert figures["mkor/refused_updates"] > 0
        assert figures["mkor/updates"] == figures["mkor/steps"] == SHORT


@pytest.mark.parametrize(("world", "name"), pairs(NAN))
def test_nan_of_one_process_reaches_no_factor(launches, world, name):
    """The weights go the way they go without a wrapper; the factors stay finite, everywhere."""
    values = launches(world)[name]
    assert_in_step(values)
    for value in values:
        assert value["weights"][: CASES[name].bad + 1].isfinite().all()
        assert not value["weights"][CASES[name].bad + 1].isfinite().all()
        assert value["figures"]["mkor/refused_updates"] > 0


@pytest.mark.parametrize(("world", "name"), pairs(["overflow on one process"]))
def test_overflow_on_one_process_is_refused_by_all(launches, world, name):
    """The squares overflow, the gradients do not: the update is dropped, the step is taken."""
    for value in launches(world)[name]:
        assert value["figures"]["mkor/refused_updates"] > 0
        assert value["figures"]["mkor/skipped_steps"] == 0
        assert value["weights"].isfinite().all()


@pytest.mark.parametrize(("world", "name"), pairs(["hybrid"]))
def test_hybrid_switches_alike(launches, world, name):
    """Each process knows its own losses only; all switch after the step at which one would."""
    expected = reference(CASES, name)["switched at"]
    assert 3 < expected < LONG
    assert [value["switched at"] for value in launches(world)[name]] == [expected] * world


def test_layers_that_matter_are_covered():
    """Every parameter of the models is preconditioned, or the comparison would prove little."""
    for name, parameters in (("linear", 9), ("convolutions", 5), ("transposed", 6), ("KFAC", 9)):
        assert len(reference(CASES, name)["covered"]) == parameters
    assert Mlp.touch is False
