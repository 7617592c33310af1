"""GPT-2, and what is built like it: DistilGPT2, Cerebras-GPT.

The dropout that its config.json names (resid_pdrop, embd_pdrop, attn_pdrop) is not applied.
"""

from typing import Any

from litpeft.config import ModelConfig, activation
from litpeft.families import Place

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
OTHER_PREFIXES = {"transformer.": ""}  # the first files of GPT-2 on the hub

# What would change the results and model.py does not do: key -> the only value that is supported.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GPT2LMHeadModel describes."""
    for key, value in FIXED.items():
        if bool(hf.get(key, value)) != value:
            raise ValueError(f"{key} {hf[key]!r} is not supported; only {value} is")
    width, heads = hf["n_embd"], hf["n_head"]
    if width % heads:
        raise ValueError(f"n_embd {width} is no multiple of n_head {heads}")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        d_model=width,
        n_layers=hf["n_layer"],
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=hf.get("n_inner") or 4 * width,
        max_positions=hf.get("n_positions", 1024),
        norm="layer",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        rotary_dim=0,
        learned_positions=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        activation=activation(hf, "activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
