"""MKOR under FSDP2 (fully_shard); a run that broke off continues from its last checkpoint.

torchrun --nproc-per-node 2 examples/fsdp.py
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 ...
(else torch 2.13 shows restarted processes the addresses of dead ones: its issue 135712)
"""

import os
import shutil
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mkor import MKOR

STEPS, BATCH, SAVE_EVERY = 120, 32, 20
CHECKPOINTS = Path("fsdp-checkpoints")
UNFINISHED = CHECKPOINTS / "unfinished"


def save(state, step):
    """A checkpoint gets its name once all of it is written."""
    dcp.save(state, checkpoint_id=UNFINISHED)
    dist.barrier()
    if dist.get_rank() == 0:
        UNFINISHED.rename(CHECKPOINTS / f"{step:06}")


def main():
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))  # NCCL or gloo
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8)
    ).to(kind)
    for layer in (*model[::2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = MKOR(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    x = torch.randn(2048, 32)
    data = TensorDataset(x, (x[:, :8] * x[:, 8:16]).argmax(1))  # the largest of eight products
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler, drop_last=True)

    losses, step = torch.zeros(STEPS), 0
    shutil.rmtree(UNFINISHED, ignore_errors=True)
    if found := sorted(CHECKPOINTS.glob("[0-9]*")):
        step = int(found[-1].name)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state, "losses": losses}, checkpoint_id=found[-1])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    while step < STEPS:
        epoch, done = divmod(step, len(loader))
        sampler.set_epoch(epoch)  # the same order again after a restart
        for x, y in islice(loader, done, done + STEPS - step):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(kind)), y.to(kind))
            loss.backward()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            optimizer.step()
            losses[step] = mean
            step += 1
            if step % SAVE_EVERY == 0:
                weights, state = get_state_dict(model, optimizer)
                save({"model": weights, "optimizer": state, "losses": losses}, step)
    if dist.get_rank() == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.barrier()  # torch's threads free tensors meanwhile; else they may lock up at the end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
