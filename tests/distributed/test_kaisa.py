"""KAISA's distribution of ``KFAC`` on 2 and 3 processes: only who computes what changes."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import mkor
from distributed.test_ddp import LONELY
from distributed.test_ddp import distributed as ddp
from support.alike import assert_equal, assert_in_step
from support.launches import launches_of
from support.nets import ConvNet
from support.parallel import EVERY, F32, LONG, Case, reference, train

OPTIONS = EVERY | {"damping": 0.03}
RESCALED = {"kl_clip": None, "rescale": "running"}
LEAST, MOST = {"fraction": "least"}, {"fraction": "most"}
OWN = "invers"
"""Inverses, and whether there are any: memory-optimal, they are with one process only."""


def kfac(net=None, setup=MOST, **how):
    options = OPTIONS | how.pop("options", {})
    return Case(*filter(None, [net]), wrap=mkor.KFAC, options=options, setup=setup, **how)


KINDS = {
    "": {},
    ", uneven": {"every": "uneven", "steps": LONG},
    ", float32": {"dtype": F32},
    ", convolutions": {"net": ConvNet, "every": "uneven"},
    ", inverse every three": {"options": {"inverse_every": 3}, "every": "uneven"},
    ", update every two": {"options": {"update_every": 2, "inverse_every": 4}},
    ", rescaled": {"options": RESCALED},
    ", pi": {"options": {"pi_correction": True}},
    ", left": {"options": {"sides": "left"}},
    ", accumulation": {"micro": 2},
    ", a process without rows": {"now_and_then": "none"},
    ", output left out": {"options": {"skip_output": True}},
    ", skipped": {"options": {"nonfinite": "skip"}, "bad": 3},
}
FEW = ("", ", uneven", ", convolutions", ", inverse every three", ", skipped")
"""What is tested of the fraction that is the default, too: the rest is as with other curvatures."""
CASES = {
    f"{fraction['fraction']}{name}": kfac(setup=fraction, **how)
    for fraction, kinds in ((LEAST, KINDS), (MOST, FEW))
    for name, how in KINDS.items()
    if name in kinds
} | {
    "least, a lonely layer": kfac(setup=LEAST | LONELY, every="lonely"),
    "most, a lonely layer": kfac(setup=MOST | LONELY, every="lonely"),
}
"""What the fraction's name says first: ``1/W``, or 1."""
ON_THREE = [
    "least",
    "least, uneven",
    "least, inverse every three",
    "least, skipped",
    "least, a lonely layer",
    "most, uneven",
]
"""What three processes run, too; two run everything."""


def distributed(case, net):
    """Under DDP, with the fraction that the case asks for; the size of the inverses is noted."""
    setup = dict(case.setup)
    world = torch.distributed.get_world_size()
    fraction = 1 / world if setup.pop("fraction") == "least" else 1.0
    options = case.options | {"grad_worker_fraction": fraction}
    return ddp(Case(**(vars(case) | {"options": options, "setup": setup})), net)


def run(place, name):
    """A process' part of a case, and how much memory its inverses take."""
    if name == "refused sharded":
        return refused_when_sharded(place.world)
    if name.startswith("refused"):
        return refused(float(name.split()[1]))
    kept = {}

    def look(_, optimizer):
        storages = [
            value.untyped_storage()
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if key.endswith("_inverse")
        ]
        kept["inverses"] = sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    return train(CASES[name], distributed, place.rank, place.world, save=look) | kept


def refused(fraction):
    """What a fraction that does not fit is told."""
    net = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    try:
        optimizer = mkor.KFAC(net, base, skip_output=False, grad_worker_fraction=fraction)
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def refused_when_sharded(world):
    """What is said of gradients that no process holds as a whole."""
    net = fully_shard(torch.nn.Linear(8, 8))
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    try:
        mkor.KFAC(net, base, skip_output=False, grad_worker_fraction=1 / world)
    except ValueError as error:
        return str(error)
    return ""


_launches = launches_of(run)


@pytest.mark.parametrize(
    ("world", "name"), [(2, name) for name in CASES] + [(3, name) for name in ON_THREE]
)
def test_equals_one_process_on_the_whole_batch(launches, world, name):
    """Neither the fraction nor the number of processes makes a difference."""
    values = launches(world)[name]
    own = OWN if name.startswith("least") else "\0"
    assert_in_step(values, own=own)
    case = CASES[name]
    assert_equal(values[0], reference(CASES, name), case.dtype, own=OWN)
    assert (values[0]["weights"][-1] - values[0]["weights"][0]).norm() > 0.03


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["least, uneven", "most, uneven"])
def test_memory_of_inverses(launches, world, name):
    """Memory-optimal, all processes together keep each inverse once; else each keeps all."""
    kept = [value["inverses"] for value in launches(world)[name]]
    widths = ((17, 8), (17, 17), (17, 18), (5, 18), (1, 6))
    whole = sum(8 * (left**2 + right**2) for left, right in widths)
    times = 1 if name.startswith("least") else world
    assert times * whole <= sum(kept) <= 1.05 * times * whole
    if times == 1:
        assert max(kept) < 0.9 * whole


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["refused 0.4", "refused 0.7", "refused 0.5"])
def test_fractions_that_do_not_fit_are_refused(launches, world, name):
    """``max(1, fraction * W)`` must be one of the divisors of ``W``."""
    workers = max(1.0, float(name.split()[1]) * world)
    for message in launches(world)[name]:
        if world % workers or workers != int(workers):
            assert "grad_worker_fraction" in message
            assert f"1/{world}" in message, "it says what would fit"
        else:
            assert not message


@pytest.mark.parametrize("world", [2])
@pytest.mark.parametrize("name", ["refused sharded"])
def test_sharing_gradients_needs_whole_ones(launches, world, name):
    for message in launches(world)[name]:
        assert "grad_worker_fraction" in message


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, "half", None, True])
def test_fractions_that_are_none_are_refused(fraction):
    net = torch.nn.Linear(2, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match="grad_worker_fraction"):
        mkor.KFAC(net, base, grad_worker_fraction=fraction)
