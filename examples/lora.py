"""MKOR on LoRA adapters: a small Llama that can count by ones learns to count by sevens."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mkor import MKOR

VOCABULARY, LENGTH = 64, 16


def train(model, optimizer, stride, steps):
    losses = []
    for _ in range(steps):
        start = torch.randint(VOCABULARY, (32, 1))
        tokens = (start + stride * torch.arange(LENGTH)) % VOCABULARY
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
    )
    pretrained = LlamaForCausalLM(config)  # in your own code: from_pretrained(...)
    train(pretrained, torch.optim.AdamW(pretrained.parameters(), lr=3e-3), stride=1, steps=60)

    model = get_peft_model(pretrained, LoraConfig(r=8, target_modules="all-linear"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = MKOR(model, torch.optim.AdamW(adapters, lr=1e-2), rank=32)
    losses = train(model, optimizer, stride=7, steps=100)
    print(optimizer.coverage())
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
