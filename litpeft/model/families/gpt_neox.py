"""GPT-NeoX: Pythia, GPT-NeoX-20B, Dolly 2, RedPajama-INCITE.

The dropout that its config.json may name (hidden_dropout, attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, Place
from litpeft.model.rope import rope_settings

QKV = Place("gpt_neox.layers.{}.attention.query_key_value", per="n_heads")
NAMES = {
    "embed": "gpt_neox.embed_in",
    "blocks.{}.norm1": "gpt_neox.layers.{}.input_layernorm",
    "blocks.{}.attn.q": QKV,
    "blocks.{}.attn.k": QKV,
    "blocks.{}.attn.v": QKV,
    "blocks.{}.attn.o": "gpt_neox.layers.{}.attention.dense",
    "blocks.{}.norm2": "gpt_neox.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
MODULES = {"embed_out": "lm_head"}
BUFFERS = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias")
ROPE_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
GGUF = Gguf(
    "gptneox",
    own_head=True,
    keys={"rope.dimension_count": "rotary_dim", "use_parallel_residual": "parallel_residual"},
    graph={
        "norm": ("layer",),
        "activation": ("gelu", "gelu_tanh"),  # llama.cpp computes both as gelu_tanh
        "gated_mlp": (False,),
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), (True,)),
    },
)
OTHER_PREFIXES = {"embed_out.": "lm_head."}  # what transformers 5 calls the head of a model in memory


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GPTNeoXConfig, beside the rotary positions."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True
    head_dim: None = None  # no key of the class, but its rotary positions would use it and its attention would not


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GPTNeoXForCausalLM describes."""
    keys = Keys.read(hf)
    width, heads = keys.hidden_size, keys.num_attention_heads
    if width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    theta, share, scaling = rope_settings(hf, keys.max_position_embeddings, "rotary_emb_base", "rotary_pct", 0.25)
    return ModelConfig(
        vocab_size=keys.vocab_size,
        d_model=width,
        n_layers=keys.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=keys.intermediate_size,
        max_positions=keys.max_position_embeddings,
        norm="layer",
        norm_eps=keys.layer_norm_eps,
        rotary_dim=int(width // heads * share),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=keys.tie_word_embeddings,
        activation=ACTIVATIONS[keys.hidden_act],
        gated_mlp=False,
        parallel_residual=keys.use_parallel_residual,
        qkv_bias=keys.attention_bias,
        output_bias=keys.attention_bias,
        mlp_bias=True,
    )
