"""What is preconditioned in each real model, written out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from support import models
from support.models import Made


@dataclass(frozen=True)
class Case:
    """A model and what mkor should make of it.

    Attributes:
        make: Builds model and loss.
        weights: Patterns of preconditioned weights; ``{a,b}`` stands for either. The biases of
            their layers are preconditioned with them.
        share: Bounds of the share of all trained entries that is preconditioned.
        falls: What may be left of the loss after 15 steps, as a share of it.
        lr: Learning rate; adapters of models with random weights need a high one.
        no_data: Patterns of those that never see data in this batch, and get raw gradients.
        apart: Biases that stay with the base nevertheless.
    """

    make: Callable[[], Made]
    weights: tuple[str, ...]
    share: tuple[float, float]
    falls: float = 0.75
    lr: float = 0.005
    no_data: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    def build(self) -> Made:
        """The same every time."""
        torch.manual_seed(0)
        return self.make()

    def covered(self, model: nn.Module) -> set[str]:
        """Names of the parameters that are preconditioned as soon as they see data."""
        return self._with_biases(model, self.weights + self.no_data)

    def silent(self, model: nn.Module) -> set[str]:
        """Names of those that see none in this batch."""
        return self._with_biases(model, self.no_data)

    def _with_biases(self, model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
        names = {name for name, _ in model.named_parameters()}
        weights = expand(patterns)
        assert weights <= names, f"no such parameters: {weights - names}"
        biases = {re.sub("weight$", "bias", name) for name in weights}
        return weights | ((biases & names) - set(self.apart))


def expand(patterns: tuple[str, ...]) -> set[str]:
    """All names that patterns with ``{a,b}`` stand for."""
    found: set[str] = set()
    for pattern in patterns:
        parts = [part.split(",") for part in re.split("[{}]", pattern)]
        found |= {"".join(choice) for choice in itertools.product(*parts)}
    return found


BERT_LAYER = "bert.encoder.layer.{0,1}."
GPT2_LAYERS = "{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}"
T5_ATTENTION = (
    "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}.weight",
    "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}.weight",
)
LLAMA_ATTENTION = "model.layers.{0,1}.self_attn.{q,k,v,o}_proj.weight"
LORA = ".lora_{A,B}.default.weight"
LORA_LLAMA = (
    "base_model.model.model.layers.{0,1}.self_attn.{q,k,v,o}_proj" + LORA,
    "base_model.model.model.layers.{0,1}.mlp.{gate,up,down}_proj" + LORA,
)
SIXTEEN = "{" + ",".join(map(str, range(16))) + "}"

TRANSFORMERS = {
    "bert": Case(
        models.bert,
        (
            BERT_LAYER + "attention.{self.query,self.key,self.value,output.dense}.weight",
            BERT_LAYER + "{intermediate,output}.dense.weight",
            "cls.predictions.transform.dense.weight",
        ),
        (0.85, 0.90),
    ),
    "gpt2": Case(
        models.gpt2,
        (f"transformer.h.{{0,1}}.{GPT2_LAYERS}.weight",),
        (0.90, 0.95),
    ),
    "llama": Case(
        models.llama,
        (LLAMA_ATTENTION, "model.layers.{0,1}.mlp.{gate,up,down}_proj.weight"),
        (0.82, 0.88),
    ),
    "vit": Case(
        models.vit,
        (
            "vit.embeddings.patch_embeddings.projection.weight",
            "vit.layers.{0,1}.attention.{q,k,v,o}_proj.weight",
            "vit.layers.{0,1}.mlp.fc{1,2}.weight",
        ),
        (0.93, 0.97),
    ),
    "resnet": Case(
        models.resnet,
        (
            "resnet.embedder.embedder.convolution.weight",
            "resnet.encoder.stages.{0,1}.layers.0.layer.{0,1}.convolution.weight",
            "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
        ),
        (0.94, 0.98),
    ),
    "t5": Case(
        models.t5,
        (
            *T5_ATTENTION,
            "encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo}.weight",
            "decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo}.weight",
        ),
        (0.93, 0.97),
    ),
}

MIXTURES = {
    "switch": Case(
        models.switch,
        (
            *T5_ATTENTION,
            "encoder.block.0.layer.1.mlp.{wi,wo}.weight",
            "decoder.block.0.layer.2.mlp.{wi,wo}.weight",
            "{encoder.block.1.layer.1,decoder.block.1.layer.2}.mlp.router.classifier.weight",
            "{encoder.block.1.layer.1,decoder.block.1.layer.2}.mlp.experts.expert_"
            + SIXTEEN
            + ".{wi,wo}.weight",
        ),
        (0.95, 0.99),
    ),
    # Its experts and its router are no layers but parameters of modules of its own.
    "mixtral": Case(models.mixtral, (LLAMA_ATTENTION,), (0.20, 0.25)),
    "mixture": Case(
        models.mixture,
        ("router.weight", "experts.{0,1,2}.{0,2}.weight"),
        (0.68, 0.74),
        no_data=("experts.3.{0,2}.weight",),
    ),
}

# What frozen random weights make of their input leaves little to adapt.
ADAPTERS = {
    "lora-gpt2": Case(
        models.lora_gpt2,
        (f"base_model.model.transformer.h.{{0,1}}.{GPT2_LAYERS}{LORA}",),
        (1.0, 1.0),
        falls=0.97,
        lr=0.01,
    ),
    "lora-llama": Case(models.lora_llama, LORA_LLAMA, (1.0, 1.0), falls=0.97, lr=0.01),
    "dora-llama": Case(models.dora_llama, LORA_LLAMA, (0.88, 0.93), falls=0.97, lr=0.01),
    "lora-bert": Case(
        models.lora_bert,
        ("base_model.model.bert.encoder.layer.{0,1}.attention.self.{query,value}" + LORA,),
        (0.84, 0.88),
        falls=0.8,
        lr=0.02,
    ),
}

TORCH = {
    "nn.Transformer": Case(
        models.translation,
        (
            "transformer.{encoder,decoder}.layers.0.self_attn.{in_proj_,out_proj.}weight",
            "transformer.decoder.layers.0.multihead_attn.out_proj.weight",
            "transformer.{encoder,decoder}.layers.0.linear{1,2}.weight",
        ),
        (0.84, 0.88),
        # One weight multiplies two inputs in it.
        no_data=("transformer.decoder.layers.0.multihead_attn.in_proj_weight",),
    ),
    "nn.MultiheadAttention": Case(
        models.attending,
        ("first.weight", "attention.{q_proj_,k_proj_,v_proj_,out_proj.}weight"),
        (0.85, 0.92),
        lr=0.02,
        apart=("attention.in_proj_bias",),
    ),
}

CASES = TRANSFORMERS | MIXTURES | ADAPTERS | TORCH
