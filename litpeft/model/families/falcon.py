"""Falcon 1 and 2 (Falcon 3 is a Llama): layer norms, one head of keys for all or for a group, an MLP without a gate.

The dropout that its config.json may name (hidden_dropout, attention_dropout) is not applied, and output_attentions is
ignored: with it transformers' class adds a mask of true and false to the scores, as 1 and 0, and tokens see later ones.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf, Place
from litpeft.model.rope import rope_settings

QKV = Place("transformer.h.{}.self_attention.query_key_value", per="n_kv_heads")
NAMES = {
    "embed": "transformer.word_embeddings",
    "blocks.{}.norm1": "transformer.h.{}.input_layernorm",
    "blocks.{}.attn.q": QKV,
    "blocks.{}.attn.k": QKV,
    "blocks.{}.attn.v": QKV,
    "blocks.{}.attn.o": "transformer.h.{}.self_attention.dense",
    "blocks.{}.norm2": "transformer.h.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
TWO_NORMS = {"blocks.{}.norm1": "transformer.h.{}.ln_attn", "blocks.{}.norm2": "transformer.h.{}.ln_mlp"}


def names(config: ModelConfig) -> dict[str, str | Place]:
    """Returns the name map: two norms that read the same input have other names."""
    return NAMES | TWO_NORMS if config.parallel_residual and not config.shared_norm else NAMES


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys that say which of the architectures the tensors of a GGUF file are of."""
    heads = header.number("attention.head_count", int)
    kv_heads = header.number("attention.head_count_kv", int, heads)
    two_norms = "blk.0.attn_norm_2.weight" in header.stored
    if not two_norms and kv_heads in (1, heads):
        return {"multi_query": kv_heads == 1}
    return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1 + two_norms}


GGUF = Gguf(
    "falcon",
    graph={
        "norm": ("layer",),
        "activation": ("gelu", "gelu_tanh"),
        "gated_mlp": (False,),
        "parallel_residual": (True,),
        "shared_norm": (False, True),
    },
    implied=implied,
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' FalconConfig, beside the rotary positions."""

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float | None = 1e-5
    num_kv_heads: int | None = None
    alibi: Literal[False, None] = False
    new_decoder_architecture: bool | None = False
    multi_query: bool | None = True
    parallel_attn: bool | None = True
    bias: bool | None = False
    max_position_embeddings: int = 2048
    ffn_hidden_size: int | None = None
    activation: Literal[tuple(ACTIVATIONS)] = "gelu"
    tie_word_embeddings: bool = True


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of FalconForCausalLM describes."""
    keys = Keys.read(hf)
    width, heads = checked("n_embed", hf.get("n_embed", keys.hidden_size), int), keys.num_attention_heads
    if width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    if keys.layer_norm_epsilon is None:
        raise ValueError("layer_norm_epsilon null is not supported; it must be a number above 0")
    new, parallel = bool(keys.new_decoder_architecture), bool(keys.parallel_attn)
    norms = keys.num_ln_in_parallel_attn or (2 if new else 1)
    if norms not in (1, 2) or (norms == 2 and not new and parallel) or (new and not parallel):
        asked = f"num_ln_in_parallel_attn {norms}, parallel_attn {parallel}, new_decoder_architecture {new}"
        raise ValueError(f"{asked} is not supported together")
    if new:
        kv_heads = keys.num_kv_heads or heads
    else:
        kv_heads = 1 if keys.multi_query else heads
        if not keys.multi_query and (keys.num_kv_heads or heads) != heads:
            raise ValueError(f"num_kv_heads {keys.num_kv_heads} is not supported with multi_query false")
    theta, _, scaling = rope_settings(hf, keys.max_position_embeddings)
    return ModelConfig(
        vocab_size=keys.vocab_size,
        d_model=width,
        n_layers=keys.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=width // heads,
        d_ff=keys.ffn_hidden_size or 4 * width,
        max_positions=keys.max_position_embeddings,
        norm="layer",
        norm_eps=keys.layer_norm_epsilon,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=keys.tie_word_embeddings,
        activation=ACTIVATIONS[keys.activation],
        gated_mlp=False,
        parallel_residual=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bool(keys.bias),
        output_bias=bool(keys.bias),
        mlp_bias=bool(keys.bias),
    )
