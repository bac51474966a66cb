"""MKOR with Accelerate: a small Llama in bfloat16, with accumulation, clipping and checkpoints."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from mkor import MKOR

VOCABULARY, LENGTH, STEPS, ACCUMULATE = 64, 16, 100, 2


def main():
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATE)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).to(accelerator.device)
    base = torch.optim.AdamW(model.parameters(), lr=4e-3)
    optimizer = MKOR(model, base, rank=32)  # first wrap, then prepare
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, STEPS)
    start, step = torch.randint(VOCABULARY, (2, 16 * STEPS * ACCUMULATE, 1))
    data = DataLoader((start + step * torch.arange(LENGTH)) % VOCABULARY, batch_size=16)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)

    losses = []
    for i, tokens in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if i == len(data) // 2:
            accelerator.save_state("accelerate-output")  # load_state continues from here
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
