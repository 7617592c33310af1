"""GPT-2 and models of its architecture: DistilGPT2, Cerebras-GPT.

The dropout that its config.json names (resid_pdrop, embd_pdrop, attn_pdrop) is not applied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, Place

QKV = Place("transformer.h.{}.attn.c_attn", transposed=True)
NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks.{}.norm1": "transformer.h.{}.ln_1",
    "blocks.{}.attn.q": QKV,
    "blocks.{}.attn.k": QKV,
    "blocks.{}.attn.v": QKV,
    "blocks.{}.attn.o": Place("transformer.h.{}.attn.c_proj", transposed=True),
    "blocks.{}.norm2": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": Place("transformer.h.{}.mlp.c_fc", transposed=True),
    "blocks.{}.mlp.down": Place("transformer.h.{}.mlp.c_proj", transposed=True),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
BUFFERS = ("*.attn.bias", "*.attn.masked_bias")
GGUF = Gguf(
    "gpt2",
    graph={
        "norm": ("layer",),
        "rotary_dim": (0,),
        "learned_positions": (True,),
        "activation": ("gelu", "gelu_tanh"),  # llama.cpp computes both as gelu_tanh
        "gated_mlp": (False,),
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), (True,)),
    },
)
OTHER_PREFIXES = {"transformer.": ""}  # the first files of GPT-2 on the hub


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GPT2Config."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: Literal[tuple(ACTIVATIONS)] = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    reorder_and_upcast_attn: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    ALIASES = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }


def narrow(shape: tuple[int, ...], hf: Mapping[str, Any], draws: torch.Generator) -> Tensor:
    """Returns an output weight of a new model: normal, and smaller the more layers there are."""
    deviation = hf.get("initializer_range", 0.02) / math.sqrt(2 * Keys.read(hf).n_layer)
    return torch.randn(shape, generator=draws) * deviation


INITIAL = {"*.attn.o.weight": narrow, "*.mlp.down.weight": narrow}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GPT2LMHeadModel describes."""
    keys = Keys.read(hf)
    width, heads = keys.n_embd, keys.n_head
    if width % heads:
        names = {field: name for field, name, _ in Keys.spelt(hf)}
        raise ValueError(f"{names['n_embd']} {width} is no multiple of {names['n_head']} {heads}")
    return ModelConfig(
        vocab_size=keys.vocab_size,
        d_model=width,
        n_layers=keys.n_layer,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=keys.n_inner or 4 * width,
        max_positions=keys.n_positions,
        norm="layer",
        norm_eps=keys.layer_norm_epsilon,
        rotary_dim=0,
        learned_positions=True,
        tie_embeddings=keys.tie_word_embeddings,
        activation=ACTIVATIONS[keys.activation_function],
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
