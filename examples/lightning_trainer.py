"""MKOR in a Lightning trainer: a small transformer learns to count, in mixed precision."""

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from mkor import MKOR, LossRateSwitch
from mkor.integrations.lightning import MKORCallback

SYMBOLS, LENGTH, WIDTH = 64, 16, 64


class Counting(lightning.LightningModule):
    """Predicts the next of numbers in a row, by ones, twos or threes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH - 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH - 1)
        self.losses = []

    def training_step(self, tokens, _):
        x = self.embed(tokens[:, :-1]) + self.position
        logits = self.head(self.body(x, mask=self.mask.to(x.device), is_causal=True))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.parameters(), lr=4e-3)
        optimizer = MKOR(self, base, hybrid=LossRateSwitch())  # hands over to AdamW later on
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main():
    torch.manual_seed(0)
    start, step = torch.randint(SYMBOLS, (3200, 1)), torch.randint(1, 4, (3200, 1))
    loader = DataLoader((start + step * torch.arange(LENGTH)) % SYMBOLS, batch_size=32)
    trainer = lightning.Trainer(
        max_epochs=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[MKORCallback(every=20)],  # logs diagnostics(), here to lightning_logs
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Counting()
    trainer.fit(model, loader)
    print(f"loss: {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
