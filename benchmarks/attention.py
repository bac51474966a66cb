"""Does it pay to precondition the projections of nn.MultiheadAttention?

Trains a character model of torch's own encoder layers with AdamW, with MKOR over it, and with MKOR
that leaves attention to the base.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mkor import MKOR
from mkor.bench.cli import UsageError, prepare_file
from mkor.bench.race import rate_factor
from mkor.bench.results import environment, write_record
from mkor.bench.tasks import VOCABULARY, Task, batches, held_out_loss, load_task

CONTESTANTS = {
    "adamw": None,
    "mkor+adamw": {},
    "mkor+adamw, attention left out": {"skip": [nn.MultiheadAttention]},
}
TUNING_SEED = 1000


class Model(nn.Module):
    """Characters in, characters out, three pre-norm encoder layers between."""

    def __init__(self, characters: int, context: int, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        how = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, **how) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.characters(x) + self.positions(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            h = layer(h, mask, is_causal=True)
        return self.output(self.norm(h))


def train(task: Task, options: dict | None, rate: float, seed: int, steps: int) -> dict[str, float]:
    """One run: held-out loss and CPU seconds."""
    inputs, _ = next(batches(task, seed))
    torch.manual_seed(seed)
    model = Model(VOCABULARY, inputs.shape[1])
    base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    optimizer = base if options is None else MKOR(model, base, **options)
    start, stream = time.process_time(), batches(task, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, steps, 0.1)
        x, y = next(stream)
        task.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    return {"loss": held_out_loss(task, model), "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    try:
        out = prepare_file("--out", arguments.out)
    except UsageError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    task = load_task("text-lm", {})
    record = {"steps": arguments.steps, "environment": environment(), "contestants": {}}
    for name, options in CONTESTANTS.items():
        rates = (3e-3, 6e-3)
        tried = {r: train(task, options, r, TUNING_SEED, arguments.steps)["loss"] for r in rates}
        rate = min(tried, key=tried.__getitem__)
        runs = [
            train(task, options, rate, seed, arguments.steps) for seed in range(arguments.seeds)
        ]
        losses = [run["loss"] for run in runs]
        record["contestants"][name] = {"tuning": tried, "rate": rate, "runs": runs}
        print(f"{name}: {statistics.fmean(losses):.4f} (lr {rate})", flush=True)
    if out:
        write_record(record, out)


if __name__ == "__main__":
    main()
