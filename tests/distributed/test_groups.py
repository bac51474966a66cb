"""Processes that train in groups of their own: two together, and a third one by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.alike import assert_effective, assert_equal, assert_in_step
from support.launches import launches_of
from support.parallel import EVERY, WHOLE, Case, base_of, reference, train

GROUPS = ([0, 2], [1])
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.5, patience=0.0, warmup=1, every=1)
KFAC = {"wrap": mkor.KFAC, "options": EVERY | {"damping": 0.1, "grad_worker_fraction": 0.5}}
CASES = {
    "MKOR": Case(every="uneven"),
    "accumulation": Case(micro=2),
    "hybrid": Case(options=WHOLE | {"hybrid": SWITCH}),
    "NaN, skipped": Case(options=WHOLE | {"nonfinite": "skip"}, bad=3),
    "FSDP2": Case(every="uneven"),
    "KAISA": Case(**KFAC, every="uneven"),
}


def run(place, name):
    """A process' part of its group's work; the groups take different numbers of steps."""
    groups = [dist.new_group(ranks) for ranks in GROUPS]
    here = next(i for i, ranks in enumerate(GROUPS) if place.rank in ranks)
    group, ranks = groups[here], GROUPS[here]

    def distributed(case, net):
        options = case.options | {"process_group": group}
        if name == "FSDP2" and len(ranks) > 1:
            fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
            return net, case.wrap(net, base_of(case, net), **options)
        optimizer = case.wrap(net, base_of(case, net), **options)
        return DistributedDataParallel(net, process_group=group), optimizer

    case = dataclasses.replace(CASES[name], steps=CASES[name].steps + 2 * here)
    return train(case, distributed, ranks.index(place.rank), len(ranks))


_launches = launches_of(run)


@pytest.mark.parametrize("world", [3])
@pytest.mark.parametrize("name", CASES)
def test_each_group_equals_one_process(launches, world, name):
    """Groups do not wait for each other, and know nothing of each other's rows."""
    first, alone, second = launches(world)[name]
    case = CASES[name]
    own = "invers" if name == "KAISA" else "\0"
    assert_in_step([first, second], own=own)
    assert_equal(first, reference(CASES, name), case.dtype, own=own)
    longer = {name: dataclasses.replace(case, steps=case.steps + 2)}
    assert_equal(alone, reference(longer, name), case.dtype)
    assert_effective(reference(longer, name))
