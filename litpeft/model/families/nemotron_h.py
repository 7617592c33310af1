"""Nemotron-H, Nemotron Nano 2 and 3: layers that are Mamba's, attention without positions, an MLP or experts alone.

Layers for further tokens (num_nextn_predict_layers), the dropouts of its config.json and the router's extra loss are
not applied. As in transformers dt is at least time_step_min, and head and embedding are never one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig
from litpeft.model.families.mamba2 import ATTENTION, MAMBA, mamba_names
from litpeft.model.parts import Layer, StateSpace
from litpeft.model.rope import FULL

LAYER = "backbone.layers.{}"
NAMES = {
    "embed": "backbone.embeddings",
    "blocks.{}.norm1": f"{LAYER}.norm",  # a layer has one of the two
    "blocks.{}.norm2": f"{LAYER}.norm",
    **mamba_names(f"{LAYER}.mixer"),
    **{f"blocks.{{}}.attn.{leaf}": f"{LAYER}.mixer.{leaf}_proj" for leaf in "qkvo"},
    **{f"blocks.{{}}.mlp.{leaf}": f"{LAYER}.mixer.{leaf}_proj" for leaf in ("up", "down")},
    "blocks.{}.mlp.router": f"{LAYER}.mixer.gate",
    **{f"blocks.{{}}.mlp.experts.{{}}.{leaf}": f"{LAYER}.mixer.experts.{{}}.{leaf}_proj" for leaf in ("up", "down")},
    **{f"blocks.{{}}.mlp.shared.{leaf}": f"{LAYER}.mixer.shared_experts.{leaf}_proj" for leaf in ("up", "down")},
    "norm": "backbone.norm_f",
    "head": "lm_head",
}
OTHER_PREFIXES = {"backbone.": "model."}
MODULES = {"backbone": "model"}
NOT_IN_PEFT = ("out_proj",)
BUFFERS = ("mtp.*",)
MOE, PLAIN = "moe", "mlp"
LETTERS = {"M": MAMBA[0], "*": FULL, "-": PLAIN, "E": MOE}  # of hybrid_override_pattern


def time_steps(shape: tuple[int, ...], hf: Mapping[str, Any], draws: torch.Generator) -> Tensor:
    """Returns dt_bias of a new model: its softplus is log-uniform between time_step_min and time_step_max."""
    least, most = (math.log(hf.get(key, default)) for key, default in (("time_step_min", 1e-3), ("time_step_max", 0.1)))
    steps = (torch.rand(shape, generator=draws) * (most - least) + least).exp()
    steps = steps.clamp(min=hf.get("time_step_floor", 1e-4))
    return steps + torch.log(-torch.expm1(-steps))


def shrunk(shape: tuple[int, ...], hf: Mapping[str, Any], draws: torch.Generator) -> Tensor:
    """Returns the output weight (out, in) of a new model's Mamba layer: uniform, and less the more layers there are."""
    if not hf.get("rescale_prenorm_residual", True):
        return torch.randn(shape, generator=draws) * hf.get("initializer_range", 0.02)
    layers = len(hf.get("layers_block_type") or hf.get("hybrid_override_pattern", ()))
    return (torch.rand(shape, generator=draws) * 2 - 1) / math.sqrt(shape[1] * layers)


INITIAL = {"*.attn.dt_bias": time_steps, "*.attn.out.weight": shrunk}
OLDER = {  # key -> its other name, which wins
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_min": "mamba_dt_min",
    "use_conv_bias": "mamba_conv_bias",
}


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' NemotronHConfig."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    layers_block_type: list[str] | None = None
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 4096
    intermediate_size: int = 21504
    mlp_hidden_act: Literal[tuple(ACTIVATIONS)] = "relu2"
    mlp_bias: bool = False
    ssm_state_size: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    mamba_hidden_act: Literal["silu", "swish"] = "silu"
    n_groups: int = 8
    conv_kernel: int = 4
    time_step_min: float = 0.001
    use_conv_bias: bool = True
    n_routed_experts: int = 8
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: Literal[None] = None
    num_experts_per_tok: int = 2
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    use_bias: bool = False
    layer_norm_epsilon: float = 1e-5

    ALIASES = {"layer_types": "layers_block_type", "num_local_experts": "n_routed_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of NemotronHForCausalLM describes."""
    keys = Keys.read(hf | {new: hf[old] for new, old in OLDER.items() if old in hf})
    kinds = kinds_of(keys, hf)
    sizes = keys.mamba_num_heads, keys.mamba_head_dim, keys.n_groups, keys.ssm_state_size, keys.conv_kernel
    bias = {"conv_bias": keys.use_conv_bias, "in_bias": keys.use_bias, "out_bias": keys.use_bias}
    mamba = Layer(only="mixer", state_space=StateSpace(*sizes, **bias, least=keys.time_step_min))
    plain = ModelConfig(
        vocab_size=keys.vocab_size,
        d_model=keys.hidden_size,
        n_layers=len(kinds),
        n_heads=keys.num_attention_heads,
        n_kv_heads=keys.num_key_value_heads,
        head_dim=keys.head_dim,
        d_ff=keys.intermediate_size,
        max_positions=keys.max_position_embeddings,
        norm_eps=keys.layer_norm_epsilon,
        rotary_dim=0,
        activation=ACTIVATIONS[keys.mlp_hidden_act],
        gated_mlp=False,
        mlp_bias=keys.mlp_bias,
        experts=experts_of(keys, kinds),
    )
    full, mlp = Layer(only="mixer"), Layer(only="mlp")
    return plain.with_layers(mamba if kind in MAMBA else full if kind in ATTENTION else mlp for kind in kinds)


def experts_of(keys: Keys, kinds: list[str]) -> Experts | None:
    """Returns the experts of the layers that have such."""
    if MOE not in kinds:
        return None
    if keys.mlp_bias:
        raise ValueError("mlp_bias true is not supported beside experts (moe in layers_block_type)")
    return Experts(
        keys.n_routed_experts,
        keys.num_experts_per_tok,
        keys.moe_intermediate_size,
        normed=keys.norm_topk_prob,
        dense_layers=tuple(number for number, kind in enumerate(kinds) if kind != MOE),
        shared_d_ff=keys.moe_shared_expert_intermediate_size,
        scale=keys.routed_scaling_factor,
        groups=keys.n_group,
        active_groups=keys.topk_group,
        wide_router=True,
        corrected=True,
    )


def kinds_of(keys: Keys, hf: dict[str, Any]) -> list[str]:
    """Returns the kinds of the layers."""
    kinds, pattern = keys.layers_block_type, hf.get("hybrid_override_pattern", "ME*-")
    if kinds is None and not (isinstance(pattern, str) and pattern and {*pattern} <= {*LETTERS}):
        what = f"hybrid_override_pattern {str(pattern)[:80]!r} is not supported"
        raise ValueError(f"{what}; it must be letters of {''.join(LETTERS)}, one for each layer")
    kinds = [LETTERS[letter] for letter in pattern] if kinds is None else kinds
    if strange := [kind for kind in kinds if kind not in (*MAMBA, *ATTENTION, PLAIN, MOE)]:
        known = ", ".join((*MAMBA, *ATTENTION, PLAIN, MOE))
        raise ValueError(f"layers_block_type (layer_types) {strange[0]!r} is not supported; it must be one of {known}")
    return kinds
