"""Mixtral: Mistral with a mixture of experts in each layer.

The noise and the extra loss of the router that its config.json may name (router_jitter_noise, router_aux_loss_coef)
and its dropout are not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig
from litpeft.model.families import EXPERTS, Gguf, in_all_layers, llama, without

NAMES = without(llama.NAMES, "*.mlp.*") | {
    "blocks.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate",
    "blocks.{}.mlp.experts.{}.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
    "blocks.{}.mlp.experts.{}.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
    "blocks.{}.mlp.experts.{}.down": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
BUFFERS = llama.BUFFERS
GGUF = Gguf("llama", pairs=True, keys=EXPERTS, graph={"experts": in_all_layers(normed=True)})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' MixtralConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    num_experts_per_tok: int = 2
    num_local_experts: int = 8

    ALIASES = {"num_experts": "num_local_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of MixtralForCausalLM describes."""
    keys = Keys.read(hf)
    experts = Experts(keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size, normed=True)
    return llama.usual(keys, hf, theta=1e6, window=keys.sliding_window, experts=experts)
