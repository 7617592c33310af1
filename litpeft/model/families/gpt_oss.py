"""gpt-oss: a mixture of experts in each layer, windows in every second one, and a score of no token in each softmax.

Its files hold the experts in MXFP4, which are read as plain weights: what is merged is written in bfloat16. The extra
loss of the router and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from dataclasses import dataclass, replace
from typing import Any

from litpeft.model.config import ClampedGate, ConfigKeys, Experts, ModelConfig, Rope
from litpeft.model.families import EXPERTS, OWN_SIZE, Gguf, Place, alternating, in_all_layers, llama, window_of, without
from litpeft.model.rope import layers_of

GATE_UP = Place("model.layers.{}.mlp.experts.gate_up_proj", per="d_ff", transposed=True, stack=True)
NAMES = without(llama.NAMES, "*.mlp.*") | {
    "blocks.{}.attn": "model.layers.{}.self_attn",  # sinks
    "blocks.{}.mlp.router": "model.layers.{}.mlp.router",
    "blocks.{}.mlp.experts.{}.gate": GATE_UP,
    "blocks.{}.mlp.experts.{}.up": GATE_UP,
    "blocks.{}.mlp.experts.{}.down": Place("model.layers.{}.mlp.experts.down_proj", transposed=True, stack=True),
}
GGUF = Gguf(
    "gpt-oss",
    own_head=True,
    yarn_truncates=False,
    keys={"attention.sliding_window": ("layers", window_of), **EXPERTS, **OWN_SIZE},
    graph={
        "experts": in_all_layers(normed=True, router_bias=True),
        "clamped_gate": (ClampedGate(1.702, 7.0),),
        "layers": lambda config: alternating(config, 2),
        **dict.fromkeys(("sinks", "qkv_bias", "output_bias", "mlp_bias"), (True,)),
    },
)
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GptOssConfig, beside the rotary positions."""

    num_hidden_layers: int = 36
    num_local_experts: int = 128
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int | None = 128
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    layer_types: list[str] | None = None
    attention_bias: bool = True

    ALIASES = {"num_experts": "num_local_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GptOssForCausalLM describes."""
    keys = Keys.read(hf)
    if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
        hf = hf | {"rope_parameters": YARN}
    number, active, size = keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size
    config = llama.usual(keys, hf, theta=150000.0)
    config = replace(
        config,
        experts=Experts(number, active, size, normed=True, router_bias=True),
        clamped_gate=ClampedGate(keys.swiglu_alpha, keys.swiglu_limit),
        mlp_bias=True,
        sinks=True,
    )
    rope = Rope(config.rope_theta, config.rope_scaling)
    slides = lambda layer: layer % 2 == 0
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, rope))
