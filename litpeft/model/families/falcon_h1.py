"""Falcon-H1: attention and Mamba side by side in each layer, with factors on all that goes in and out.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any

from litpeft.model.config import ModelConfig
from litpeft.model.families import llama
from litpeft.model.families.deepseek_v3 import refuse_null
from litpeft.model.families.mamba2 import LlamaAndMamba2Keys, mamba_names, state_space
from litpeft.model.parts import Beside, Layer, Rope

LAYER = "model.layers.{}"
NAMES = llama.NAMES | {
    **mamba_names(f"{LAYER}.mamba", "blocks.{}.attn.state"),
    "blocks.{}.norm2": f"{LAYER}.pre_ff_layernorm",
    **{f"blocks.{{}}.mlp.{leaf}": f"{LAYER}.feed_forward.{leaf}_proj" for leaf in ("gate", "up", "down")},
    "norm": "model.final_layernorm",
}
BUFFERS = llama.BUFFERS
NOT_IN_PEFT = ("out_proj",)
FACTORS = ("lm_head", "embedding", "key", "attention_out", "attention_in", "ssm_in", "ssm_out")


@dataclass(frozen=True)
class Keys(LlamaAndMamba2Keys):
    """What decides the logits of transformers' FalconH1Config, beside the rotary positions."""

    max_position_embeddings: int = 8192
    mamba_d_ssm: int | None = 1024
    mamba_norm_before_gate: bool | None = True
    mamba_rms_norm: bool | None = False
    projectors_bias: bool | None = False
    lm_head_multiplier: float | None = 1.0
    embedding_multiplier: float | None = 1.0
    mlp_multipliers: list[float] | None = None
    key_multiplier: float | None = 1.0
    attention_out_multiplier: float | None = 1.0
    attention_in_multiplier: float | None = 1.0
    ssm_multipliers: list[float] | None = None
    ssm_in_multiplier: float | None = 1.0
    ssm_out_multiplier: float | None = 1.0


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of FalconH1ForCausalLM describes."""
    keys = Keys.read(hf | {key: in_floats(hf[key]) for key in ("mlp_multipliers", "ssm_multipliers") if key in hf})
    refuse_null(keys, *(f"{name}_multiplier" for name in FACTORS))
    refuse_null(keys, "mamba_norm_before_gate", "mamba_rms_norm", "projectors_bias")
    config = llama.usual(
        keys,
        hf,
        embed_scale=keys.embedding_multiplier,
        logit_scale=keys.lm_head_multiplier,
        mlp_scales=factors(keys, "mlp_multipliers", 2),
    )
    config = replace(config, score_scale=config.head_dim**-0.5 * keys.key_multiplier)
    count = config.n_layers
    if count > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {count} is not supported")
    norm = ("before" if keys.mamba_norm_before_gate else "after") if keys.mamba_rms_norm else None
    layer = Layer(
        rope=Rope(config.rope_theta, config.rope_scaling),
        state_space=state_space(keys, hf, keys.mamba_d_ssm, norm=norm, out_bias=keys.projectors_bias),
        beside=Beside(
            attention_in=keys.attention_in_multiplier,
            attention_out=keys.attention_out_multiplier,
            state_in=keys.ssm_in_multiplier,
            state_out=keys.ssm_out_multiplier,
            parts=factors(keys, "ssm_multipliers", 5),
        ),
    )
    return config.with_layers([layer] * count)


def in_floats(value: Any) -> Any:
    """Returns a list with its whole numbers as floats, anything else as it is."""
    return [float(one) if type(one) is int else one for one in value] if isinstance(value, list) else value


def factors(keys: Keys, name: str, count: int) -> tuple[float, ...]:
    """Returns the numbers of a list; without one they are 1."""
    given = getattr(keys, name)
    if given is not None and len(given) != count:
        raise ValueError(f"{name} {str(given)[:80]} is not supported; it must be {count} numbers")
    return (1.0,) * count if given is None else tuple(given)
