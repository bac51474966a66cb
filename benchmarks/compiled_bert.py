"""What MKOR adds to a training step of a compiled model.

Trains a BERT of 4 layers of width 256 on masked words, 16 sequences of 128, with AdamW and with
MKOR over it, one step of each in turn, compiled in one graph and eager, and prints the tables of
`mkor overhead`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from mkor import Preconditioned
from mkor.bench import overhead
from mkor.bench.contestants import parse_contestants
from mkor.bench.models import Subject, Worker
from mkor.bench.results import FORMAT, environment, package_version, write_record

SIZES = {"layers": 4, "width": 256, "heads": 4, "words": 4096, "length": 128, "batch": 16}
SEED, MASKED = 0, 0.15


class MaskedWords(nn.Module):
    """From words and labels to the loss, so that the loss is compiled with the model."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=SIZES["words"],
            hidden_size=SIZES["width"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            intermediate_size=4 * SIZES["width"],
            max_position_embeddings=SIZES["length"],
        )
        self.bert = BertForMaskedLM(config)

    def forward(self, batch: Tensor) -> Tensor:
        words, labels = batch
        return self.bert(input_ids=words, labels=labels).loss


def subject(backend: str) -> Subject:
    """The same weights and words for everyone; random words cost what a text costs."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (SIZES["batch"], SIZES["length"])
    words = torch.randint(1, SIZES["words"], shape, generator=generator)
    hidden = torch.rand(shape, generator=generator) < MASKED
    batch = torch.stack([words.masked_fill(hidden, 0), words.masked_fill(~hidden, -100)])

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        model = MaskedWords()
        if backend == "eager":
            return model
        return torch.compile(model, backend=backend, fullgraph=True)

    return Subject("bert-mini", SIZES, build, lambda loss, _: loss, (batch, torch.zeros(())))


def check_captures(worker: Worker) -> None:
    """Compiled code that has lost the hooks would be fast indeed."""
    if isinstance(worker.optimizer, Preconditioned):
        states = worker.optimizer.state.values()
        learnt = max(int(state["mkor_updates"]) for state in states if "mkor_updates" in state)
        assert learnt == worker.optimizer.diagnostics()["mkor/updates"], "updates without data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--contestants", default="adamw,mkor+adamw", help="the first is the base")
    parser.add_argument("--backends", default="inductor,eager")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Else a model without hooks and one with hooks share their compiled code.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    record = {
        "format": FORMAT,
        "model": {"name": "bert-mini", "sizes": SIZES},
        "rounds": arguments.rounds,
        "environment": environment() | {"transformers": package_version("transformers")},
        "backends": {},
    }
    for backend in arguments.backends.split(","):
        print(f"\n{backend}\n")
        torch.compiler.reset()
        contestants = parse_contestants(arguments.contestants)
        workers = [Worker(contestant, subject(backend)) for contestant in contestants]
        # Until every search for output layers has ended, nothing is compiled.
        for worker in workers:
            worker.iterate()
        for worker in workers:
            worker.warm_up()
        overhead.take_turns(workers, arguments.rounds)
        for worker in workers:
            check_captures(worker)
        timings = overhead.examine(workers)
        overhead.print_timings(timings, sys.stdout)
        record["backends"][backend] = [asdict(timing) for timing in timings]
    if arguments.out:
        write_record(record, arguments.out)


if __name__ == "__main__":
    main()
