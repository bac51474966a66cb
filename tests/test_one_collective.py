"""Every update takes one collective, whatever passes a process sees; nothing captured is lost."""

import itertools

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mkor
import mkor.step.application
from processes import launch

F64 = torch.float64
WHOLE = {"rank": 8, "vectors": 1, "rows": None, "skip_output": False}


def build(sizes=(4, 6, 3), **how):
    torch.manual_seed(0)
    pairs = itertools.pairwise(sizes)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in pairs])
    return net.to(F64), WHOLE | how


def weights(net):
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def batch(step, rows=8):
    torch.manual_seed(step)
    return torch.randn(rows, 4, dtype=F64)


def empty_second_pass(place, shards):
    """Two synchronised passes in a step; from the third step on, one process' second is empty."""
    with place.group():
        net, how = build()
        model = net
        if shards:
            fully_shard(net[0])
            fully_shard(net)
        elif place.world > 1:
            model = DistributedDataParallel(net)
        optimizer = mkor.MKOR(net, torch.optim.SGD(net.parameters(), lr=0.05), **how)
        for step in range(5):
            optimizer.zero_grad()
            mine = batch(step).tensor_split(place.world)[place.rank]
            model(mine).square().sum().backward()
            more = mine[: 0 if step > 1 and place.rank == 1 else 2]
            model(more).square().sum().backward()
            optimizer.step()
        return weights(net)


def test_a_process_whose_second_pass_is_empty(tmp_path):
    for name, shards in (("ddp", False), ("fsdp", True)):
        folder = tmp_path / name
        folder.mkdir()
        first, second = launch(empty_second_pass, 2, folder, shards, timeout=60.0, collective=15.0)
        assert torch.equal(first, second)
        assert first.isfinite().all()


def one_pass_then_two(place):
    """Passes after the first of a step, where there used to be one, count in the next update."""
    with place.group():
        net, how = build()
        model = DistributedDataParallel(net)
        optimizer = mkor.MKOR(net, torch.optim.SGD(net.parameters(), lr=0.05), **how)
        found = []
        for step in range(6):
            optimizer.zero_grad()
            for again in range(1 + (step in (3, 4))):
                x = batch(10 * step + again).tensor_split(place.world)[place.rank]
                model(x).square().sum().backward()
            optimizer.step()
            found.append(optimizer.state[net[0][0].weight]["mkor_updates"].item())
        return weights(net), found


def test_more_passes_than_in_the_first_step(tmp_path):
    (first, updates), (second, _) = launch(
        one_pass_then_two, 2, tmp_path, timeout=60.0, collective=15.0
    )
    assert torch.equal(first, second)
    assert updates == [1, 2, 3, 4, 5, 6]


def group_in_mid_step(place):
    with place.group():
        net, how = build()
        model = DistributedDataParallel(net) if place.world > 1 else net
        base = torch.optim.SGD(net[0].parameters(), lr=0.05)
        optimizer = mkor.MKOR(net, base, **how)
        for step in range(4):
            optimizer.zero_grad()
            net.zero_grad()
            loss = model(batch(step).tensor_split(place.world)[place.rank]).square().sum()
            (loss * place.world).backward()
            if step == 2:
                optimizer.add_param_group({"params": net[1].parameters()})
            optimizer.step()
        return weights(net), optimizer.state[net[0][0].weight]["mkor_updates"].item()


def test_what_was_sent_early_survives_a_new_group(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    ((expected, count),) = launch(group_in_mid_step, 1, alone, timeout=60.0, collective=15.0)
    assert count == 4
    for found, updates in launch(group_in_mid_step, 2, tmp_path, timeout=60.0, collective=15.0):
        assert updates == 4
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def compiled(place):
    with place.group():
        net, how = build()
        model = DistributedDataParallel(net)
        optimizer = mkor.MKOR(net, torch.optim.SGD(net.parameters(), lr=0.01), **how)
        step = torch.compile(model, backend="aot_eager")
        for number in range(14):
            optimizer.zero_grad()
            step(batch(number).tensor_split(place.world)[place.rank]).square().sum().backward()
            optimizer.step()
        return optimizer.state[net[0][0].weight]["mkor_updates"].item()


def test_compiled_captures_that_were_sent_early_are_seen(tmp_path):
    """The check for silent hooks looks at what arrived, not at buffers that were emptied."""
    assert launch(compiled, 2, tmp_path, timeout=80.0, collective=30.0) == [14, 14]


def uneven_blocks(place, threshold):
    mkor.step.application.STACK_BELOW = threshold
    with place.group():
        net, how = build((4, 9, 9, 9))
        fully_shard(net)
        optimizer = mkor.MKOR(net, torch.optim.SGD(net.parameters(), lr=0.05), **how)
        for step in range(4):
            optimizer.zero_grad()
            net(batch(step).tensor_split(place.world)[place.rank]).square().sum().backward()
            optimizer.step()
        return weights(net)


def test_blocks_of_different_sizes_are_exchanged_in_one_order(tmp_path):
    """9 rows on two processes are 5 and 4: 45 and 36 entries, on both sides of the threshold."""
    found = []
    for threshold in (40, 1 << 16):
        folder = tmp_path / str(threshold)
        folder.mkdir()
        found += launch(uneven_blocks, 2, folder, threshold, timeout=60.0, collective=15.0)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
