"""What MKOR adds to a training iteration of a compiled model.

Trains a BERT of 4 layers of width 256 on masked words, 16 sequences of 128, with AdamW and with
MKOR over it: one iteration of each in turn, compiled in one graph and eager. The figure is the CPU
time of a whole iteration (forward, backward and step) over AdamW's in the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from mkor import Preconditioned
from mkor.bench.compare import checked_contestants
from mkor.bench.contestants import Contestant
from mkor.bench.errors import UsageError
from mkor.bench.files import FORMAT, write_record
from mkor.bench.machine import environment, package_version
from mkor.bench.overhead_tables import print_timings
from mkor.bench.places import prepare_file
from mkor.bench.rounds import in_turn
from mkor.bench.timing import Timing, summarize_all
from mkor.bench.worker import Subject, Worker

SIZES = {"layers": 4, "width": 256, "heads": 4, "words": 4096, "length": 128, "batch": 16}
SEED = 0
MASKED = 0.15


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

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, labels = batch
        return self.bert(input_ids=words, labels=labels).loss


def subject(backend: str) -> Subject:
    """The same weights and words for everyone; random words cost what a text costs."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (SIZES["batch"], SIZES["length"])
    words = torch.randint(1, SIZES["words"], shape, generator=generator)
    hidden = torch.rand(shape, generator=generator) < MASKED
    batch = (words.masked_fill(hidden, 0), words.masked_fill(~hidden, -100))

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        model = MaskedWords()
        if backend == "eager":
            return model
        return torch.compile(model, backend=backend, fullgraph=True)

    return Subject("bert-mini", SIZES, build, lambda loss, _: loss, (batch, torch.zeros(())))


def measure(contestants: Sequence[Contestant], backend: str, rounds: int) -> list[Timing]:
    """Times the contestants in turn, then profiles each; the first is the base."""
    workers = [Worker(contestant, subject(backend)) for contestant in contestants]
    # Until every search for output layers has ended, nothing is compiled.
    for worker in workers:
        worker.iterate()
    for worker in workers:
        worker.warm_up()
    for index in range(rounds):
        for worker in in_turn(workers, index):
            worker.timed()
    timings = summarize_all(workers)
    for worker in workers:
        check_captures(worker)
    return timings


def check_captures(worker: Worker) -> None:
    """Compiled code that has lost the hooks would be fast indeed."""
    if not isinstance(worker.optimizer, Preconditioned):
        return
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
    try:
        out = prepare_file("--out", arguments.out)
    except UsageError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    # Else a model without hooks and one with hooks share their compiled code.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    contestants = checked_contestants(arguments.contestants)
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
        timings = measure(contestants, backend, arguments.rounds)
        print_timings(timings, sys.stdout)
        record["backends"][backend] = [asdict(timing) for timing in timings]
    if out:
        write_record(record, out)


if __name__ == "__main__":
    main()
