"""MKOR in the Hugging Face Trainer: a small BERT learns to fill in masked tokens."""

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from mkor import MKOR
from mkor.integrations.huggingface import MKORCallback, optimizer_factory

VOCABULARY, LENGTH, MASK = 64, 16, 0


def sentences(n):
    """Numbers in a row, by ones, twos or threes; every fourth of them masked."""
    start, step = torch.randint(VOCABULARY, (n, 1)), torch.randint(1, 4, (n, 1))
    tokens = (start + step * torch.arange(LENGTH)) % (VOCABULARY - 1) + 1
    hidden = torch.rand(n, LENGTH) < 0.25
    labels = tokens.masked_fill(~hidden, -100)
    inputs = tokens.masked_fill(hidden, MASK)
    return [{"input_ids": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def main():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
    )
    args = TrainingArguments(
        output_dir="trainer-output",
        max_steps=200,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        weight_decay=0.01,  # not of biases and norms
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to=[],  # or ["tensorboard"], which gets the diagnostics too
        disable_tqdm=True,
    )
    trainer = Trainer(
        BertForMaskedLM(config),
        args,
        train_dataset=sentences(5000),
        optimizer_cls_and_kwargs=optimizer_factory(MKOR, args, rank=32),
    )
    trainer.add_callback(MKORCallback(trainer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
