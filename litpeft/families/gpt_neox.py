"""GPT-NeoX: Pythia, GPT-NeoX-20B, Dolly 2, RedPajama-INCITE.

The dropout that its config.json may name (hidden_dropout, attention_dropout) is not applied.
"""

from typing import Any

from litpeft.config import ModelConfig, activation, rope_settings
from litpeft.families import Place

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
BUFFERS = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias")
OTHER_PREFIXES = {"embed_out.": "lm_head."}  # what transformers 5 calls the head of a model in memory


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GPTNeoXForCausalLM describes."""
    theta, scaling = rope_settings(hf | {"rope_theta": hf.get("rotary_emb_base", 10000.0)})
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    share = float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25)))
    bias = bool(hf.get("attention_bias", True))
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        d_model=width,
        n_layers=hf["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=float(hf.get("layer_norm_eps", 1e-5)),
        rotary_dim=int(width // heads * share),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=activation(hf, "hidden_act", "gelu"),
        gated_mlp=False,
        parallel_residual=bool(hf.get("use_parallel_residual", True)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )
