"""KAISA while the model grows, and where processes run out of batches."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import mkor
from support.processes import launch

F64 = torch.float64


def build(world, fraction, **how):
    """A model whose first layers are trained, and the parameters of the others."""
    torch.manual_seed(0)
    sizes = (4, 6, 9, 12, 3)
    layers = [nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in itertools.pairwise(sizes)]
    net = nn.Sequential(*layers).double()
    model = DistributedDataParallel(net) if world > 1 else net
    base = torch.optim.SGD(net[:2].parameters(), lr=0.01)
    how = {"damping": 0.1, "kl_clip": None, "skip_output": False} | how
    return net, model, mkor.KFAC(model, base, grad_worker_fraction=fraction, **how)


def late(place, fraction, every):
    """The first layers' gradients in steps of which the fourth has more layers than before."""
    rank, world, found = place.rank, place.world, []
    with place.group():
        net, model, optimizer = build(world, fraction, inverse_every=every)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": net[2:].parameters()})
            torch.manual_seed(step)
            mine = torch.randn(8, 4, dtype=F64).tensor_split(world)[rank]
            net.zero_grad()
            model(mine).square().mean().backward()
            optimizer.step()
            found.append(torch.cat([p.grad.flatten() for p in net[:2].parameters()]))
    return torch.stack(found)


@pytest.fixture(scope="module", name="alone")
def _alone(tmp_path_factory):
    """The gradients of one process."""
    (found,) = launch(late, 1, tmp_path_factory.mktemp("alone"), 1.0, 1)
    return found


@pytest.mark.parametrize(("world", "fraction"), [(2, 0.5), (2, 1.0), (4, 0.5)])
def test_layers_that_come_later(world, fraction, alone, tmp_path):
    """They change who inverts the others, and whose inverses those are, but not what comes out."""
    for found in launch(late, world, tmp_path, fraction, 1, timeout=60.0, collective=20.0):
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)


def test_inverses_that_move_between_inversions(tmp_path):
    """Who gets a layer has no inverse of it, and makes one: nothing is multiplied by 0."""
    first, second = launch(late, 2, tmp_path, 0.5, 100, timeout=60.0, collective=20.0)
    assert torch.equal(first, second)
    assert first.norm(dim=1).min() > 0.1 * first.norm(dim=1).max()


def join(place):
    with place.group():
        _, model, optimizer = build(place.world, 0.5)
        with pytest.raises(ValueError, match=r"Join.*grad_worker_fraction=1\.0"):
            Join([model, optimizer])


def test_join_is_refused(tmp_path):
    """A process without batches has no gradients to precondition for others."""
    launch(join, 2, tmp_path, timeout=60.0, collective=20.0)
