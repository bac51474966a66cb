"""Tiny versions of real models, each with a loss on one batch of random words or images.

Nothing is downloaded: every model is built from its config, with weights of its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

WORDS, CLASSES = 40, 5
TEXT = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = TEXT | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 16}
BERT = TEXT | {
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}

Made = tuple[nn.Module, Callable[[], Tensor]]
"""A model, and a function that gives its loss on the one batch it has."""


# --------------------------------------------------------------------------------- batches


def words(n: int = 4, length: int = 12) -> Tensor:
    return torch.randint(WORDS, (n, length))


def images(size: int, n: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, size, size), "labels": torch.randint(CLASSES, (n,))}


def on_words(model: nn.Module) -> Made:
    """Trained to say its own input, shifted or not."""
    ids = words()
    return model, lambda: model(input_ids=ids, labels=ids).loss


def on_images(model: nn.Module, size: int) -> Made:
    batch = images(size)
    return model, lambda: model(**batch).loss


# -------------------------------------------------------------------------- transformers


def bert() -> Made:
    """Masked words: 3 of 4 do not count."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    ids = words()
    labels = ids.masked_fill(torch.rand(ids.shape) > 0.25, -100)
    inputs = ids.masked_fill(labels >= 0, 1)
    return model, lambda: model(input_ids=inputs, labels=labels).loss


def gpt2() -> Made:
    return on_words(gpt2_model())


def gpt2_model() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Made:
    return on_words(llama_model())


def llama_model() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def vit() -> Made:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=12,
        patch_size=4,
        num_labels=CLASSES,
    )
    return on_images(transformers.ViTForImageClassification(config), 12)


def resnet() -> Made:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return on_images(transformers.ResNetForImageClassification(config), 24)


def t5() -> Made:
    return on_words(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, d_ff=48)))


# -------------------------------------------------------------------- mixtures of experts


def switch() -> Made:
    """One expert for each word: 12 words cannot reach all of the 16 in a layer."""
    config = transformers.SwitchTransformersConfig(
        **T5,
        d_ff=24,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=16,
        router_jitter_noise=0.0,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    ids = words(1)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def mixtral() -> Made:
    """All experts of a layer in one parameter of three dimensions."""
    config = transformers.MixtralConfig(**(LLAMA | {"intermediate_size": 24}), num_local_experts=4)
    return on_words(transformers.MixtralForCausalLM(config))


class Mixture(nn.Module):
    """Experts of linear layers; the batch says which word goes to which."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.router = nn.Linear(16, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(experts)
        )
        self.output = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor, chosen: Tensor) -> Tensor:
        x = self.embedding(ids)
        weight = self.router(x).softmax(-1).gather(-1, chosen[..., None])
        y = x.clone()
        for i, expert in enumerate(self.experts):
            here = chosen == i
            if here.any():
                y[here] = x[here] + weight[here] * expert(x[here])
        return self.output(y)

    def loss(self, ids: Tensor, chosen: Tensor) -> Tensor:
        return functional.cross_entropy(self(ids, chosen).flatten(0, 1), ids.flatten())


def mixture() -> Made:
    """The last expert never sees a word."""
    model, ids = Mixture(), words()
    return model, lambda: model.loss(ids, ids % 3)


# ------------------------------------------------------------------------- peft and torch


def lora(model: nn.Module, targets: list[str] | str, **how) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **how)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property by its old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(model, config)


def lora_gpt2() -> Made:
    """Adapters of ``Conv1D`` layers."""
    return on_words(lora(gpt2_model(), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))


def lora_llama() -> Made:
    return on_words(lora(llama_model(), "all-linear"))


def dora_llama() -> Made:
    """Its layers also run once to find the length of the whole weight, without a gradient."""
    return on_words(lora(llama_model(), "all-linear", use_dora=True))


def lora_bert() -> Made:
    """A new output layer is trained beside the adapters."""
    config = transformers.BertConfig(**BERT, num_labels=CLASSES)
    model = transformers.BertForSequenceClassification(config)
    adapted = lora(model, ["query", "value"], task_type="SEQ_CLS")
    ids, labels = words(8), torch.randint(CLASSES, (8,))
    return adapted, lambda: adapted(input_ids=ids, labels=labels).loss


class Translation(nn.Module):
    """``torch.nn.Transformer`` between an embedding and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.output = nn.Linear(32, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.output(self.transformer(self.embedding(source), self.embedding(target)))


def translation() -> Made:
    model, source, target = Translation(), words(), words(4, 9)

    def loss() -> Tensor:
        return functional.cross_entropy(model(source, target).flatten(0, 1), target.flatten())

    return model, loss


class Attending(nn.Module):
    """``nn.MultiheadAttention`` with keys and values of other widths, so with three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, kdim=6, vdim=5, batch_first=True)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x), x, x[..., :5])[0].mean(1))


def attending() -> Made:
    model, x, y = Attending(), torch.randn(16, 7, 6), torch.randint(CLASSES, (16,))
    return model, lambda: functional.cross_entropy(model(x), y)
