"""A set-up that differs between processes is named on all of them at once, instead of a hang."""

import copy
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.launches import launches_of
from support.processes import described

SECONDS = 10.0
OPTIONS = {"rank": 4, "vectors": 2, "rows": 8}


def net_of(width=6, depth=1, dtype=None, name="inner"):
    inner = {f"{name}{i}": nn.Linear(width, width, dtype=dtype) for i in range(depth)}
    first, last = nn.Linear(4, width, dtype=dtype), nn.Linear(width, 2, dtype=dtype)
    model = nn.Sequential()
    for key, module in {"first": first, **inner, "last": last}.items():
        model.add_module(key, module)
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def model(differs, **how):
    """A model of its own, not under DDP, which would have noticed."""
    net = net_of(**(how if differs else {}))
    return net, mkor.MKOR(net, sgd(net.parameters()), **OPTIONS)


def settings(differs, wrap=mkor.MKOR, under=None, common=None, **changed):
    """Other settings."""
    net = net_of()
    options = (OPTIONS if wrap is mkor.MKOR else {}) | (common or {})
    optimizer = wrap(net, sgd(net.parameters()), **(options | (changed if differs else {})))
    if under == "ddp":
        net = DistributedDataParallel(net)
    return net, optimizer


def sharded(differs, **changed):
    """Other settings, under FSDP2."""
    net = fully_shard(net_of())
    options = OPTIONS | (changed if differs else {})
    return net, mkor.MKOR(net, sgd(net.parameters()), **options)


def curvature(differs, other, under=None):
    """Another optimizer altogether."""
    net = net_of()
    wrap, options = (other, {}) if differs else (mkor.MKOR, OPTIONS)
    optimizer = wrap(net, sgd(net.parameters()), **options)
    return (DistributedDataParallel(net) if under == "ddp" else net), optimizer


def parameters(differs, left_out, under=None):
    """A base that holds fewer parameters."""
    net = net_of()
    held = [p for n, p in net.named_parameters() if not (differs and n.startswith(left_out))]
    optimizer = mkor.MKOR(net, sgd(held), **OPTIONS)
    return (DistributedDataParallel(net) if under == "ddp" else net), optimizer


def frozen(differs, name):
    """A weight that is not trained."""
    net = net_of()
    net.get_parameter(name).requires_grad_(not differs)
    return net, mkor.MKOR(net, sgd(net.parameters()), **OPTIONS)


def checkpoint(differs, earlier=True, seed=0, nothing=False):
    """The states of another step or another run."""
    torch.manual_seed(seed if differs else 0)
    net = net_of()
    trained = mkor.MKOR(net, sgd(net.parameters()), process_group=alone(), **OPTIONS)
    states = []
    for step in range(4):
        take_step(net, trained, step)
        states.append(copy.deepcopy(trained.state_dict()))
    trained.close()
    optimizer = mkor.MKOR(net, sgd(net.parameters()), **OPTIONS)
    if not (differs and nothing):
        optimizer.load_state_dict(states[1 if differs and earlier else 3])
    return net, optimizer


def alone():
    """A group of this process only."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


SWITCH = mkor.LossRateSwitch(warmup=3)
WRONG = {
    "a layer more": (model, {"depth": 2}, "inner1"),
    "another width": (model, {"width": 7}, "7"),
    "another dtype": (model, {"dtype": torch.float64}, "float64"),
    "another name": (model, {"name": "outer"}, "outer0"),
    "rank": (settings, {"rank": 5}, "rank"),
    "vectors": (settings, {"vectors": 3}, "vectors"),
    "rows": (settings, {"rows": None}, "rows"),
    "momentum": (settings, {"momentum": 0.5}, "momentum"),
    "damping": (settings, {"damping": 0.5}, "damping"),
    "factor dtype": (settings, {"factor_dtype": torch.bfloat16}, "factor_dtype"),
    "update every": (settings, {"update_every": 2}, "update_every"),
    "sides": (settings, {"sides": "left"}, "sides"),
    "rescale": (settings, {"rescale": None}, "rescale"),
    "kl clip": (settings, {"rescale": None, "kl_clip": 0.1}, "kl_clip"),
    "reduce": (settings, {"reduce": "gather"}, "reduce"),
    "skip": (settings, {"skip": ["inner*"]}, "inner"),
    "skip output": (settings, {"skip_output": False}, "output"),
    "nonfinite": (settings, {"nonfinite": "skip"}, "nonfinite"),
    "hybrid": (settings, {"hybrid": SWITCH}, "hybrid"),
    "inverse every": (settings, {"wrap": mkor.KFAC, "inverse_every": 2}, "inverse_every"),
    "fraction": (
        settings,
        {"wrap": mkor.KFAC, "common": {"grad_worker_fraction": 1.0}, "grad_worker_fraction": None},
        "grad_worker_fraction",
    ),
    "rule": (
        settings,
        {"wrap": mkor.DenseMKOR, "common": {"update_every": 1}, "rule": "exact"},
        "rule",
    ),
    "vectors, DDP": (settings, {"under": "ddp", "vectors": 3}, "vectors"),
    "sides, DDP": (settings, {"under": "ddp", "sides": "right"}, "sides"),
    "update every, DDP": (settings, {"under": "ddp", "update_every": 2}, "update_every"),
    "reduce, DDP": (settings, {"under": "ddp", "reduce": "gather"}, "reduce"),
    "skip, DDP": (settings, {"under": "ddp", "skip": ["inner*"]}, "inner"),
    "nonfinite, DDP": (settings, {"under": "ddp", "nonfinite": "skip"}, "nonfinite"),
    "rank, FSDP2": (sharded, {"rank": 5}, "rank"),
    "skip, FSDP2": (sharded, {"skip": ["inner*"]}, "inner"),
    "dense": (curvature, {"other": mkor.DenseMKOR}, "Dense"),
    "KFAC": (curvature, {"other": mkor.KFAC}, "(KFAC|Covariance)"),
    "Eva, DDP": (curvature, {"other": mkor.Eva, "under": "ddp"}, "(Eva|RankOne)"),
    "KFAC, DDP": (curvature, {"other": mkor.KFAC, "under": "ddp"}, "(KFAC|Covariance)"),
    "a base without a layer": (parameters, {"left_out": "inner0"}, "inner0"),
    "a base without a bias": (parameters, {"left_out": "first.bias"}, "first"),
    "a base without a layer, DDP": (parameters, {"left_out": "inner0", "under": "ddp"}, "inner0"),
    "a frozen weight": (frozen, {"name": "inner0.weight"}, "inner0"),
    "an earlier checkpoint": (checkpoint, {}, "(step|update|checkpoint)"),
    "no checkpoint": (checkpoint, {"nothing": True}, "(step|update|checkpoint)"),
    "another run's checkpoint": (checkpoint, {"earlier": False, "seed": 1}, "(factor|checkpoint)"),
}


def take_step(net, optimizer, step):
    optimizer.zero_grad()
    torch.manual_seed(step)
    net(torch.randn(16, 4, dtype=next(net.parameters()).dtype)).square().mean().backward()
    optimizer.step()


def run(place, name):
    """Build the case, where one process differs, and take two steps; what is raised is told."""
    kind, odd = name.rsplit("/", 1)
    build, how, _ = WRONG[kind]
    how = dict(how)
    if kind == "fraction":
        how["grad_worker_fraction"] = 1 / place.world
    start = time.monotonic()
    try:
        net, optimizer = build(place.rank == int(odd), **how)
        for step in range(2):
            take_step(net, optimizer, step)
    except RuntimeError as error:
        return described(error, start)
    return None


_launches = launches_of(run)


FEW = ("a layer more", "rank", "skip, DDP", "KFAC, DDP", "a base without a layer")


@pytest.mark.parametrize(
    ("world", "name"),
    # Of three, the first or the last differs, in turn.
    [(2, f"{name}/1") for name in WRONG]
    + [(3, f"{name}/{i % 2 * 2}") for i, name in enumerate(FEW)],
)
def test_what_differs_is_named_on_all_processes(launches, world, name):
    """A ``RuntimeError`` says which process has what, within seconds."""
    kind, odd = name.rsplit("/", 1)
    for failure in launches(world)[name]:
        assert failure is not None, "no process may go on"
        assert failure["kind"] == "RuntimeError", failure["trace"]
        assert failure["seconds"] < SECONDS
        assert re.search(WRONG[kind][2], failure["message"]), failure["message"]
        assert f"process {odd}" in failure["message"].lower()
