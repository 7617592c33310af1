"""Granite 4.0: Granite whose MLP has other names; with experts, all tokens go through it. Layers may be Mamba's.

The router's extra loss and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.core.errors import ModelError
from litpeft.model import families
from litpeft.model.config import ACTIVATIONS, Experts, ModelConfig, or_zero
from litpeft.model.families import Gguf, Place, granite, granitemoe, llama
from litpeft.model.families.deepseek_v3 import refuse_null
from litpeft.model.families.mamba2 import ATTENTION, MAMBA, Mamba2Keys, mamba_names, state_space
from litpeft.model.parts import Layer, Rope, state_space_of

MLP = Place("model.layers.{}.shared_mlp.input_linear")
NAMES = granitemoe.NAMES | {
    "blocks.{}.mlp.gate": MLP,
    "blocks.{}.mlp.up": MLP,
    "blocks.{}.mlp.down": "model.layers.{}.shared_mlp.output_linear",
    "blocks.{}.mlp.shared.gate": MLP,
    "blocks.{}.mlp.shared.up": MLP,
    "blocks.{}.mlp.shared.down": "model.layers.{}.shared_mlp.output_linear",
    **mamba_names("model.layers.{}.mamba"),
}
SSM = {  # key of a header -> the number of StateSpace
    "ssm.conv_kernel": "width",
    "ssm.state_size": "state",
    "ssm.group_count": "groups",
    "ssm.time_step_rank": "heads",
    "ssm.inner_size": "inner",
}


def no_gguf(config: ModelConfig) -> str | None:
    """Returns what llama.cpp does not compute in a model with layers of Mamba."""
    sizes = state_space_of(config.layers)
    if not any(layer.attends for layer in config.layers):
        return "llama.cpp has attention in some layers (config.json: layer_types)"
    if sizes.in_bias:
        return "llama.cpp's layers of Mamba have no such biases (config.json: mamba_proj_bias)"
    if (sizes.least, sizes.most) != (0.0, None):
        return "llama.cpp has no limits of dt (config.json: time_step_limit)"
    return None


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys of config.json that a file with layers of Mamba says otherwise."""
    count, width = header.number("block_count", int), header.number("embedding_length", int)
    heads, inner = header.own.get("attention.head_count_kv"), header.number("ssm.inner_size", int)
    if not isinstance(heads, list) or len(heads) != count or inner % width:
        what = "attention.head_count_kv must be a list, and ssm.inner_size a multiple of embedding_length"
        raise ModelError(f"{what}, in a header of {header.arch}")
    shared = "expert_shared_feed_forward_length" if header.own.get("expert_count") else "feed_forward_length"
    return {
        "layer_types": [ATTENTION[1] if number else MAMBA[1] for number in heads],
        "position_embedding_type": "rope" if header.own.get("rope.scaling.finetuned", True) else None,
        "num_local_experts": header.own.get("expert_count", 0),
        "shared_intermediate_size": header.number(shared, int),
        "mamba_expand": inner // width,
        "mamba_n_heads": header.number("ssm.time_step_rank", int),
        "mamba_d_state": header.number("ssm.state_size", int),
        "mamba_n_groups": header.number("ssm.group_count", int),
        "mamba_d_conv": header.number("ssm.conv_kernel", int),
        "mamba_conv_bias": any(f"blk.{layer}.ssm_conv1d.bias" in header.stored for layer in range(count)),
        "attention_bias": any(f"blk.{layer}.attn_q.bias" in header.stored for layer in range(count)),
    }


def said(name: str) -> tuple[str, Callable[[Any], Any]]:
    """Returns how a number of the layers of Mamba is found."""
    return "layers", lambda layers: getattr(state_space_of(layers), name)


HYBRID = Gguf(
    "granitehybrid",
    pairs=True,
    refuses=no_gguf,
    implied=implied,
    keys={
        **granite.GGUF.keys,
        **families.EXPERTS,
        **families.SHARED_SIZE,
        "feed_forward_length": ("", lambda config: config.experts.d_ff if config.experts else config.d_ff),
        **{key: said(name) for key, name in SSM.items()},
        "attention.head_count_kv": ("", lambda config: [config.n_kv_heads * layer.attends for layer in config.layers]),
        "rope.scaling.finetuned": ("", lambda config: config.rotary_dim is None),  # whether anything rotates
    },
    graph={"qkv_bias": llama.EITHER, "output_bias": llama.EITHER, "rotary_dim": (None, 0)},
    names={
        **{f"blocks.{{}}.mlp.{name}": f"blk.{{}}.ffn_{name}" for name in ("gate", "up", "down")},
        **{f"blocks.{{}}.mlp.shared.{name}": f"blk.{{}}.ffn_{name}_shexp" for name in ("gate", "up", "down")},
    },
)
GGUF = Gguf(
    "granite",
    pairs=True,
    keys=granite.GGUF.keys,
    graph={"qkv_bias": llama.EITHER, "output_bias": llama.EITHER},
    names=HYBRID.names,
    hybrid=HYBRID,
)


@dataclass(frozen=True)
class Keys(Mamba2Keys):
    """What decides the logits of transformers' GraniteMoeHybridConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    embedding_multiplier: int | float | None = 1.0
    logits_scaling: int | float | None = 1.0
    residual_multiplier: int | float | None = 1.0
    attention_multiplier: int | float | None = 1.0
    num_local_experts: int | None = or_zero(8)
    num_experts_per_tok: int | None = or_zero(2)
    shared_intermediate_size: int = 1024
    position_embedding_type: Literal["rope", "nope", None] = None  # the last two: none
    layer_types: list[str] | None = None

    ALIASES = {"layers_block_type": "layer_types"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GraniteMoeHybridForCausalLM describes."""
    keys = Keys.read(hf)
    refuse_null(keys, *granite.SCALES, "num_local_experts", "num_experts_per_tok")
    if keys.num_local_experts and not keys.num_experts_per_tok:
        raise ValueError(f"num_experts_per_tok 0 of {keys.num_local_experts} experts is not supported")
    sizes = keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size
    shared = keys.shared_intermediate_size
    experts = Experts(*sizes, normed=True, shared_d_ff=shared) if keys.num_local_experts else None
    config = llama.usual(keys, hf, d_ff=shared, experts=experts, **granite.scales(keys))
    rope = None
    if keys.position_embedding_type == "rope":
        rope = Rope(config.rope_theta, config.rope_scaling)
    else:
        config = replace(config, rotary_dim=0, rope_theta=10000.0, rope_scaling=None)
    kinds = kinds_of(keys)
    if not any(kinds):
        return config
    if keys.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {keys.hidden_act!r} is not supported in a model with layers of Mamba; silu is")
    mamba = Layer(state_space=state_space(keys, hf))
    return config.with_layers(mamba if kind else Layer(rope=rope) for kind in kinds)


def kinds_of(keys: Keys) -> list[bool]:
    """Returns for each layer whether it is one of Mamba's."""
    types, count = keys.layer_types, keys.num_hidden_layers
    if count > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {count} is not supported")
    types = [MAMBA[0]] * count if types is None else types
    if strange := [kind for kind in types if kind not in ATTENTION + MAMBA]:
        raise ValueError(f"layer_types {strange[0]!r} is not supported; it must be one of {ATTENTION + MAMBA}")
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers says {count}")
    return [kind in MAMBA for kind in types]
