"""MKOR under DistributedDataParallel; a run that broke off continues from its last checkpoint.

torchrun --nproc-per-node 2 examples/ddp.py
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 ...
(else torch 2.13 shows restarted processes the addresses of dead ones: its issue 135712)
"""

import os
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mkor import MKOR

STEPS, BATCH, SAVE_EVERY = 120, 32, 20
CHECKPOINT = "ddp.pt"


def save(state):
    """The old checkpoint or the new one, never half of one."""
    temporary = CHECKPOINT + ".tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, CHECKPOINT)


def main():
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8)
    ).to(device)
    model = DistributedDataParallel(net)
    optimizer = MKOR(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    x = torch.randn(2048, 32)
    data = TensorDataset(x, (x[:, :8] * x[:, 8:16]).argmax(1))  # the largest of eight products
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler, drop_last=True)

    losses = []
    if os.path.exists(CHECKPOINT):
        saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    while len(losses) < STEPS:
        epoch, done = divmod(len(losses), len(loader))
        sampler.set_epoch(epoch)  # the same order again after a restart
        for x, y in islice(loader, done, done + STEPS - len(losses)):
            optimizer.zero_grad()
            loss = cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            optimizer.step()
            losses.append(mean.item())
            if dist.get_rank() == 0 and len(losses) % SAVE_EVERY == 0:
                parts = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
                save({**parts, "losses": losses})
    if dist.get_rank() == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.barrier()  # torch's threads free tensors meanwhile; else they may lock up at the end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
