"""Two processes under DistributedDataParallel: like one process on the whole batch, and in step."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import mkor

WORLD = 2
SAMPLES = 16
STEPS = 5
TIMEOUT = 60.0

WHOLE = {"rank": 6, "vectors": 1, "rows": None, "skip_output": False, "momentum": 0.9}
CHUNKS = {"rank": 6, "vectors": 2, "rows": 4, "momentum": 0.9}
EVERY = {"skip_output": False, "momentum": 0.9}
SWITCH = mkor.LossRateSwitch(fraction=0.9, smoothing=0.5, patience=0.0, warmup=0, every=1)
EXACT = {
    "wrapped before DDP": {"options": WHOLE},
    "wrapped after DDP": {"options": WHOLE, "ddp_first": True},
    "unequal batches": {"options": WHOLE, "cut": 5},
    "every other step, not rescaled": {"options": WHOLE | {"update_every": 2, "rescale": None}},
    "accumulation": {"options": WHOLE, "micro": 2},
    "a layer used by one process": {"options": WHOLE, "cut": 6, "lonely": True},
    "dense factors": {"wrap": mkor.DenseMKOR, "options": EVERY | {"update_every": 1}, "cut": 5},
    "KFAC": {"wrap": mkor.KFAC, "options": EVERY | {"damping": 0.1}, "cut": 5},
    "KFAC, accumulation": {"wrap": mkor.KFAC, "options": EVERY | {"damping": 0.1}, "micro": 2},
    "Eva": {"wrap": mkor.Eva, "options": EVERY | {"damping": 0.3}, "cut": 5},
    "hybrid": {"options": WHOLE | {"hybrid": SWITCH}},
}
IN_STEP = {
    "chunks": {"options": CHUNKS},
    "chunks, accumulation": {"options": CHUNKS, "micro": 2},
    "chunks, a layer used by one process": {"options": CHUNKS, "lonely": True},
    "a bad batch on one process": {"options": CHUNKS | {"nonfinite": "skip"}, "bad": 2},
}
CASES = EXACT | IN_STEP


class Net(nn.Module):
    """A convolution, a layer used twice, one that not every call uses, and an output layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.first = nn.Linear(48, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.extra = nn.Linear(8, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x, extra):
        x = self.first(self.conv(x).relu().flatten(1)).tanh()
        x = self.again(self.again(x).tanh()).tanh()
        return self.output(self.extra(x).tanh() if extra else x)


def pieces(case, step, rank):
    """A process' micro-batches, and whether each uses the extra layer; without a rank, all."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 1, 4, 4, generator=generator)
    y = torch.randint(3, (SAMPLES,), generator=generator)
    cut, lonely = case.get("cut", SAMPLES // 2), case.get("lonely", False)
    if case.get("bad") == step:
        x[cut:] = torch.nan
    if rank is None and not lonely:
        return [(x, y, True)]
    shards = [(x[:cut], y[:cut], True), (x[cut:], y[cut:], not lonely)]
    micro = case.get("micro", 1)
    return [
        (xi, yi, extra)
        for x, y, extra in (shards if rank is None else shards[rank : rank + 1])
        for xi, yi in zip(x.chunk(micro), y.chunk(micro), strict=True)
    ]


def train(case, rank=None):
    """Train alone on whole batches, or as one of the processes on its part of them."""
    torch.manual_seed(0)
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model = net
    if rank is not None:
        model = DistributedDataParallel(net, find_unused_parameters=case.get("lonely", False))
    watched = model if case.get("ddp_first") else net
    optimizer = case.get("wrap", mkor.MKOR)(watched, base, **case["options"])
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        todo = pieces(case, step, rank)
        for i, (x, y, extra) in enumerate(todo):
            if rank is not None:
                model.require_backward_grad_sync = i == len(todo) - 1
            # Divided by the whole batch, so that the average over processes is its mean's gradient.
            loss = cross_entropy(model(x, extra), y, reduction="sum") / SAMPLES
            loss = loss * (1 if rank is None else WORLD)
            loss.backward()
            if "hybrid" in case["options"]:
                optimizer.report_loss(loss)
        optimizer.step()
        history.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    state = optimizer.state_dict()["state"]
    return {
        "weights": torch.stack(history),
        "state": [v for entry in state.values() for _, v in sorted(entry.items())],
        "covered": [row.parameter for row in optimizer.coverage() if row.preconditioned],
        "figures": optimizer.diagnostics(),
        "switched at": optimizer.switched_at,
    }


def work(rank, folder):
    """A process: train every case and leave the results in a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    try:
        torch.save({name: train(case, rank) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", name="processes")
def _processes(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("processes")
    context = mp.spawn(work, (folder,), nprocs=WORLD, join=False, daemon=True)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, f"the processes hang: no end after {TIMEOUT} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", EXACT)
def test_equals_one_process_on_the_whole_batch(processes, name):
    """With one mean over all rows, how the batch is shared out makes no difference."""
    alone = train(EXACT[name])
    if not alone["switched at"]:
        assert len(alone["covered"]) == 9, "every parameter is preconditioned"
    torch.testing.assert_close(
        processes[0][name]["weights"], alone["weights"], rtol=1e-5, atol=1e-5
    )
    # The damping shows the scale of the statistics, which the preconditioner itself forgets.
    assert processes[0][name]["figures"] == pytest.approx(alone["figures"], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_processes_stay_in_step(processes, name):
    """Weights, factors, output layers and figures are bitwise the same on all processes."""
    first, second = (results[name] for results in processes)
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()
    for mine, theirs in zip(first["state"], second["state"], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    assert first["covered"] == second["covered"]
    assert first["figures"] == second["figures"]


def test_a_bad_batch_on_one_process_is_skipped_by_all(processes):
    """One process' NaN costs every process that update and that step, and nothing else."""
    name = "a bad batch on one process"
    bad = CASES[name]["bad"]
    for results in processes:
        weights = results[name]["weights"]
        assert torch.equal(weights[bad], weights[bad - 1])
        assert not torch.equal(weights[bad + 1], weights[bad])
        assert results[name]["figures"]["mkor/skipped_steps"] == 1
        assert results[name]["figures"]["mkor/refused_updates"] > 0


def test_hybrid_switches_alike(processes):
    """Each process knows its own losses only; all switch after the step at which one would."""
    alone = train(CASES["hybrid"])["switched at"]
    assert 1 < alone < STEPS
    assert [results["hybrid"]["switched at"] for results in processes] == [alone] * WORLD
