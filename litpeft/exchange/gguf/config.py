"""config.json of a model, from the header of its GGUF file.

Which keys belong to which is in KEYS for all families. What llama.cpp computes with is in the families' tables: a
config.json is right if write.py would make this header of it.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any

import numpy as np

from litpeft.core.errors import ModelError, UserError, nearest
from litpeft.exchange.gguf.alike import alike
from litpeft.exchange.gguf.by_layer import sizes as layered_sizes
from litpeft.exchange.gguf.layout import Layout, allowed
from litpeft.exchange.gguf.rope import SCALING, header_rope
from litpeft.exchange.gguf.write import header
from litpeft.model.config import ModelConfig
from litpeft.model.families import FAMILIES, family
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.rope import spell_twice

LARGEST_WIDTH = 1 << 20
LARGEST_CONTEXT = 1 << 31
MOST_EXPERTS = 1024
# key of the header, without the architecture -> type, and its names in config.json: a family's class knows one, or none
KEYS = {
    "context_length": (int, "max_position_embeddings", "n_positions"),
    "embedding_length": (int, "hidden_size", "n_embd"),
    "block_count": (int, "num_hidden_layers", "n_layer"),
    "feed_forward_length": (int, "intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": (int, "num_attention_heads", "n_head"),
    "attention.head_count_kv": (int, "num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": (float, "rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": (float, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": (int, "sliding_window"),
    "attention.clamp_kqv": (float, "clip_qkv"),
    "attention.scale": (float, "attention_multiplier"),
    "attn_logit_softcapping": (float, "attn_logit_softcapping"),
    "final_logit_softcapping": (float, "final_logit_softcapping"),
    "embedding_scale": (float, "embedding_multiplier"),
    "residual_scale": (float, "residual_multiplier"),
    "logit_scale": (float, "logit_scale", "logits_scaling"),
    "attention.q_lora_rank": (int, "q_lora_rank"),
    "attention.kv_lora_rank": (int, "kv_lora_rank"),
    "attention.value_length_mla": (int, "v_head_dim"),
    "leading_dense_block_count": (int, "first_k_dense_replace", "moe_layer_start_index"),
    "interleave_moe_layer_step": (int, "moe_layer_interval"),
    "expert_count": (int, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": (int, "num_experts_per_tok", "moe_k"),
    "expert_feed_forward_length": (int, "moe_intermediate_size"),
    "expert_shared_count": (int, "n_shared_experts", "moe_num_shared_experts"),
    "expert_shared_feed_forward_length": (int, "shared_expert_intermediate_size"),
    "expert_weights_scale": (float, "routed_scaling_factor"),
    "expert_weights_norm": (bool, "norm_topk_prob"),
    "expert_group_count": (int, "n_group"),
    "expert_group_used_count": (int, "topk_group"),
    "use_parallel_residual": (bool, "use_parallel_residual"),
    "ssm.conv_kernel": (int, "linear_conv_kernel_dim"),
    "ssm.state_size": (int, "linear_key_head_dim"),
    "ssm.group_count": (int, "linear_num_key_heads"),
    "ssm.time_step_rank": (int, "linear_num_value_heads"),
    "shortconv.l_cache": (int, "conv_L_cache"),
}
WIDTHS = {*KEYS["feed_forward_length"][1:]}  # a family with none of them has experts in each layer
# key of config.json -> tensors of the first layer, one of which is there if it is true
BIASES = {
    "attention_bias": ("attn_q", "attn_qkv"),
    "qkv_bias": ("attn_q", "attn_qkv"),
    "use_qkv_bias": ("attn_q", "attn_qkv"),
    "use_bias": ("attn_q", "attn_qkv"),
    "mlp_bias": ("ffn_up",),
}
# key of config.json -> a field of ModelConfig that llama.cpp does not read from the header, and the key's value then
IMPLIED = {
    "query_pre_attn_scalar": ("score_scale", lambda scale: round(scale**-2)),
    "norm_topk_prob": ("experts", lambda experts: experts.normed),
}
WITHOUT_KEY = {  # what a header of latent attention says by leaving a key out, or by 0
    "q_lora_rank": None, "first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
IDLE = (  # without effect, or read elsewhere
    "vocab_size", "tensor_data_layout", "context_length", "rope.freq_base_swa", "attention.recurrent_layers",
)  # fmt: skip
CLASSES = {
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}


class Header:
    """The keys of a file's header that begin with the name of its architecture, and its tensors by name."""

    def __init__(self, values: Mapping[str, Any], stored: Mapping[str, Any]):
        self.arch, self.stored = str(values.get("general.architecture")), stored
        own = f"{self.arch}."
        self.own = {key.removeprefix(own): value for key, value in values.items() if key.startswith(own)}

    def __contains__(self, key: str) -> bool:
        return key in self.own

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns the value of a key, or `default`: of this type, positive and of a plausible size."""
        value = self.own.get(key, default)
        if isinstance(value, list) and len(numbers := {*value} - {0}) == 1:  # one for each layer; 0: it has none
            value = numbers.pop()
        top = LARGEST_CONTEXT if key.endswith("context_length") else LARGEST_WIDTH
        if type(value) is kind and value > 0 and (math.isfinite(value) if kind is float else value <= top):
            return single(value) if kind is float else value
        expected = "a positive number" if kind is float else f"an integer from 1 to {top}"
        hint = "the header is damaged, or of a model that is no such one"
        raise ModelError(f"{self.arch}.{key} must be {expected}, got {value}", hint=hint)

    def take(self, key: str, kind: type) -> Any:
        """Returns the value of a key; None if it is missing, or zero, which switches the thing off."""
        value = self.own.get(key)
        if kind is bool and type(value) in (bool, NoneType):
            return value
        return None if value is None or value == 0 else self.number(key, kind)

    @property
    def family(self) -> str:
        """Returns the `model_type` of the models that this architecture has.

        If there are several, the first of those with experts or without, and with windows or without, as the file's.
        """
        known: dict[str, list[str]] = {}
        for name in FAMILIES:
            if (gguf := getattr(family(name), "GGUF", None)) is not None:
                for arch in {gguf.arch} if gguf.hybrid is None else {gguf.arch, gguf.hybrid.arch}:
                    known.setdefault(arch, []).append(name)
        if self.arch not in known:
            what = f"architecture {self.arch!r} is not supported; convert reads {', '.join(known)}"
            hint = "take the Hugging Face edition of the model, which needs no conversion"
            raise ModelError(what + nearest(self.arch, list(known)), hint=hint)
        mixed, windowed = (self.own.get(key, 0) != 0 for key in ("expert_count", "attention.sliding_window"))

        def differs(name: str) -> tuple[bool, bool, bool]:
            gguf = family(name).GGUF.named(self.arch)
            other = gguf.only is not None and self.own.get(gguf.only[0]) != gguf.only[1]
            return ("experts" in gguf.graph) != mixed, other, ("attention.sliding_window" in gguf.keys) != windowed

        return min(known[self.arch], key=differs)


def class_of(name: str) -> str:
    """Returns transformers' class of a family."""
    return CLASSES.get(name, f"{name.title().replace('_', '')}ForCausalLM")


def hf_config(values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without dtype and special tokens; `stored` are the file's tensors by name."""
    given = Header(values, stored)
    name, embedding = given.family, stored.get("token_embd.weight")
    module = family(name)
    known = module.GGUF.named(given.arch)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("there is no matrix token_embd.weight")
    hf = {"architectures": [class_of(name)], "model_type": name, "vocab_size": int(embedding.shape[1])}
    hf |= switches(given, module.Keys) | sizes(given, module.Keys) | known.implied(given)
    head = stored.get("output.weight")
    hf["tie_word_embeddings"] = head is None or known.own_head and same_bytes(head, embedding)
    hf |= header_rope(given, name)
    spell_twice(hf, getattr(module, "ROPE_NAMES", {}))
    _, config = config_of(hf, "")
    spelt = {field.name for field in fields(module.Keys)}
    for key, (field, said) in IMPLIED.items():
        if key in spelt:
            hf[key] = said(allowed(known, config, field)[0])
    _, config = config_of(hf, "")
    check(given, name, config)
    return hf


def sizes(given: Header, keys: type) -> dict[str, Any]:
    """Returns the numbers of the header under their names in config.json."""
    layers = given.number("block_count", int)
    if layers > len(given.stored):
        raise ModelError(f"{len(given.stored)} tensors cannot be {layers} layers")
    spelt = {field.name: field.type for field in fields(keys)}
    by_layer = "num_kv_shared_layers" in spelt
    width, heads = given.number("embedding_length", int), given.number("attention.head_count", int)
    kv_heads = heads if by_layer else given.number("attention.head_count_kv", int, heads)
    usual = max(width // heads, 1)
    head_dim = given.number("attention.key_length", int, usual)
    if head_dim % 2 or heads % kv_heads or heads * head_dim > LARGEST_WIDTH:
        what = f"{heads} query and {kv_heads} key/value heads of size {head_dim}"
        raise ModelError(f"{what} do not make an attention")
    given.number("context_length", int)
    if not by_layer and not WIDTHS.isdisjoint(spelt):
        given.number("feed_forward_length", int)
    if (experts := given.own.get("expert_count", 0)) and given.number("expert_count", int) > MOST_EXPERTS:
        raise ModelError(
            f"{given.arch}.expert_count {experts} is more than {MOST_EXPERTS}", hint="the header is damaged"
        )
    found = {}
    for key, (kind, *names) in KEYS.items():
        name = next((name for name in names if name in spelt), None)
        known = name is not None and not isinstance(given.own.get(key), list)  # a list is of layers that differ
        if known and (value := given.take(key, kind)) is not None:
            found[name] = value
    if by_layer:
        return layered_sizes(given, found)
    if "kv_lora_rank" in spelt:
        return latent_sizes(given, found, heads)
    found |= {"num_key_value_heads": kv_heads} if "num_key_value_heads" in spelt else {}
    takes_any = "head_dim" in spelt and spelt["head_dim"] is not None
    return found | ({"head_dim": head_dim} if takes_any or head_dim != usual else {})


def latent_sizes(given: Header, found: dict[str, Any], heads: int) -> dict[str, Any]:
    """Returns the numbers of a model with latent attention; `found` are those that all families have."""
    if "attention.key_length_mla" not in given:
        hint = "take a newer GGUF file of the model: since April 2025 attn_kv_b is split into attn_k_b and attn_v_b"
        raise ModelError(f"{given.arch}.attention.key_length_mla is missing", hint=hint)
    turning, size = given.number("rope.dimension_count", int), given.number("attention.key_length_mla", int)
    if turning >= size:
        raise ModelError(f"{turning} dimensions of a head of {size} cannot rotate", hint="the header is damaged")
    said = {"qk_rope_head_dim": turning, "qk_nope_head_dim": size - turning, "num_key_value_heads": heads}
    return WITHOUT_KEY | found | said


def switches(given: Header, keys: type) -> dict[str, bool]:
    """Returns which biases the tensors say that there are."""
    spelt = {field.name for field in fields(keys)}
    is_there = {key: any(f"blk.0.{name}.bias" in given.stored for name in names) for key, names in BIASES.items()}
    return {key: value for key, value in is_there.items() if key in spelt}


def check(given: Header, name: str, config: ModelConfig) -> None:
    """Raises unless writing a model of this config gives the header: for keys that a config.json cannot express."""
    try:
        said = header(Layout(NameMap(name, config)))
    except UserError as error:
        raise ModelError(error.what) from None
    said = {key.removeprefix(f"{given.arch}."): value for key, value in said.items()}
    idle = IDLE if WIDTHS & {field.name for field in fields(family(name).Keys)} else (*IDLE, "feed_forward_length")
    for key, value in given.own.items():
        if key in idle or key in SCALING or of_granite_4(given.arch, key, value, config):
            continue
        if key in said and not alike(said[key], value):
            what = f"{given.arch}.{key} = {value}: {class_of(name)} needs it to be {said[key]}"
            raise ModelError(what)
        window = key == "attention.sliding_window" and config.window == value
        if key == "attention.sliding_window_pattern" and in_turn(config, value):
            continue
        if key not in said and not window and value not in (0, False):
            raise ModelError(f"{class_of(name)} cannot express {given.arch}.{key} = {value}")


def of_granite_4(arch: str, key: str, value: Any, config: ModelConfig) -> bool:
    """Returns whether a key is one that llama.cpp's script writes of Granite 4.0, and nobody reads."""
    if arch not in ("granite", "granitehybrid"):
        return False
    shared = key == "expert_shared_feed_forward_length" and config.experts is None and value == config.d_ff
    idle = key.startswith("ssm.") if arch == "granite" else key.startswith("rope.") and not config.rotary_size
    return shared or (idle and key != "rope.scaling.finetuned")


def in_turn(config: ModelConfig, pattern: Any) -> bool:
    """Returns whether these layers have a window: a flag for each, or of so many in turn all but the last."""
    if isinstance(pattern, int):
        pattern = [at % pattern < pattern - 1 for at in range(config.n_layers)]
    return pattern == [config.layer(at).window is not None for at in range(config.n_layers)]


def same_bytes(one: Any, other: Any) -> bool:
    """Returns whether two tensors of a file are the same."""
    return one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data)


def single(value: float) -> float:
    """Returns the shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
