"""MKOR in a plain loop: digits of 8x8 pixels, with a schedule, clipping and a checkpoint."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from mkor import MKOR

EPOCHS, BATCH = 8, 128
CHECKPOINT = "plain.pt"


def build():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = MKOR(model, base)  # from here on, an ordinary torch optimizer
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, x, y, epochs):
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    return losses


def main():
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    first = build()
    print(first[1].coverage())  # which parameters are preconditioned, and if not, why
    losses = train(*first, x, y, EPOCHS // 2)
    torch.save([part.state_dict() for part in first], CHECKPOINT)

    second = build()  # another day
    for part, state in zip(second, torch.load(CHECKPOINT, weights_only=True), strict=True):
        part.load_state_dict(state)
    losses += train(*second, x, y, EPOCHS - EPOCHS // 2)
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
