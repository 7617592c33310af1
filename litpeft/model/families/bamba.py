"""Bamba: LLaMA of which half of each head rotates; most layers are Mamba's.

The dropout and the extra loss that its config.json may name (attention_dropout, z_loss_coefficient) are not applied.
"""

from dataclasses import dataclass
from typing import Any

from litpeft.model.config import ModelConfig
from litpeft.model.families import falcon_h1, llama
from litpeft.model.families.mamba2 import LlamaAndMamba2Keys, mamba_names, state_space
from litpeft.model.parts import Layer, Rope

NAMES = falcon_h1.NAMES | mamba_names("model.layers.{}.mamba")
BUFFERS = llama.BUFFERS


@dataclass(frozen=True)
class Keys(LlamaAndMamba2Keys):
    """What decides the logits of transformers' BambaConfig, beside the rotary positions."""

    max_position_embeddings: int = 262144
    attn_layer_indices: list[int] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of BambaForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, {key: hf[key] for key in hf if key != "partial_rotary_factor"}, share=0.5)
    if config.n_layers > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {config.n_layers} is not supported")
    mamba = Layer(state_space=state_space(keys, hf))
    full, own = Layer(rope=Rope(config.rope_theta, config.rope_scaling)), keys.attn_layer_indices or ()
    return config.with_layers(full if layer in own else mamba for layer in range(config.n_layers))
