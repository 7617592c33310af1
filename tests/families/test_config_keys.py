"""config.json is read as transformers' class of its model_type reads it: each key of each class, in every family."""

import copy
import json
import math
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_origin

import pytest
import torch
from conftest import TINY, in_float64
from safetensors.torch import save_file
from test_model import FAMILY_CASES, GPT2, LLAMA3, YARN, longrope, rotary
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from litpeft.core.errors import UserError
from litpeft.model.build import build
from litpeft.model.config import ACTIVATIONS, OR_ZERO, ConfigKeys
from litpeft.model.families import FAMILIES, family
from litpeft.model.families.read import read_config
from litpeft.model.gpt import ACTIVATIONS as FUNCTIONS

BY_TYPE = {"rope_parameters": {"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 500.0}}}
SIZES = {
    "llama": TINY | rotary(1.0),
    "mistral": TINY | rotary(1.0) | {"sliding_window": 8},
    "mixtral": TINY | rotary(1.0) | {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {key: value for key, value in TINY.items() if key != "num_key_value_heads"} | rotary(0.5),
    "gpt2": GPT2,
} | {name: TINY | rotary(1.0) | FAMILY_CASES[name] for name in FAMILY_CASES if name in FAMILIES}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
for _name, _changes in {  # so that each key has an effect
    "qwen2": WINDOWS | {"max_window_layers": 1},
    "qwen3": WINDOWS | {"max_window_layers": 1},
    "qwen2_moe": WINDOWS | {"mlp_only_layers": [1], "max_window_layers": 2, "num_hidden_layers": 3},
    "qwen3_moe": WINDOWS | {"mlp_only_layers": [1]},
    "qwen3_next": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "smollm3": WINDOWS | {"no_rope_layer_interval": 2},
    "ernie4_5_moe": {"num_hidden_layers": 4, "moe_layer_end_index": 2, "moe_norm_min": 0.6},
    "gemma3_text": BY_TYPE,
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "gemma4_text": BY_TYPE | {"num_kv_shared_layers": 2, "attention_k_eq_v": True},
    "olmo3": BY_TYPE | {"num_hidden_layers": 2},
    "phi3": {"hidden_size": 128, "original_max_position_embeddings": 32, "rope_parameters": longrope(32, 16)},
    "ministral3": {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "olmo": {"clip_qkv": 0.2},
    **{name: rotary(0.5) for name in ("bamba", "phi", "glm", "glm4", "glm4_moe", "stablelm", "nemotron")},
}.items():
    SIZES[_name] = SIZES[_name] | _changes
IDLE = {
    "falcon": ("num_kv_heads", "num_ln_in_parallel_attn"),  # without effect where new_decoder_architecture is false
    "lfm2_moe": ("use_expert_bias",),  # whose bias starts at 0
    "falcon_h1": ("mamba_expand",),  # where mamba_d_ssm is a number
    "qwen3_moe": ("num_experts",),  # transformers writes num_local_experts, which wins
}
SLOW = ("bamba", "falcon_h1", "lfm2_moe")  # their keys are nearly those of granitemoehybrid and lfm2
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES]
CLASSES = {name: CONFIG_MAPPING[name] for name in FAMILIES}
LINEAR = {"rope_type": "linear", "factor": 4.0}
# What is not a field of any of these classes: older spellings, and keys that transformers looks for in every config.
BESIDE = {
    "rope_scaling": LINEAR,
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.25,
    "rotary_pct": 0.25,
    "rotary_emb_base": 500,
    "original_max_position_embeddings": 32,
    "is_causal": False,
    "per_layer_config": {"0": {"hidden_act": "relu"}},
    "layer_types": ["full_attention", "full_attention"],
    "no_rope_layers": [0, 0],
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 500.0,
    "n_embed": 32,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 8,
    "final_logit_softcapping": 5.0,
    "quantization_config": None,
}
HARMLESS = {
    "torch_dtype": "bfloat16",
    "n_ctx": 256,
    "num_labels": 3,
    "output_attentions": True,  # in Falcon it is not, see test_others.py
    "pruned_heads": {"0": [1]},
}
# Values away from the default where it does not suggest one.
AWAY = {
    "rope_parameters": LINEAR | {"rope_theta": 5000.0},
    "head_dim": 24,
    "n_inner": 80,
    "dtype": "bfloat16",
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "architectures": ["Other"],
    "problem_type": "regression",
    "summary_activation": "tanh",
    "hidden_act": "relu",
    "activation_function": "relu",
}
LARGE = ("hidden_size", "n_embd", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
LISTS = ("layer_types", "no_rope_layers")  # transformers writes them even where other keys say what is in them
IDS = torch.randint(0, TINY["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(1))


def class_keys(name: str) -> dict[str, Any]:
    """Returns the keys that transformers' class has, under all their names, with their defaults."""
    found = {field.name: field.default for field in fields(CLASSES[name]) if field.default is not MISSING}
    aliases = CLASSES[name].attribute_map.items()
    return found | {alias: found[key] for alias, key in aliases if key in found}  # Qwen3-MoE's field is the alias


EVERY = ("llama", "mistral", "gpt_neox", "gpt2")  # families of which the keys of all others' classes are tried, too
OWN_ROPES = {
    *EVERY,
    "phi3",
    "gemma3_text",
    "olmo3",
    "ministral3",
    "smollm3",
    "phi",
    "falcon",
}  # read in ways of their own
GENERAL = {field.name for field in fields(PreTrainedConfig)} - {"tie_word_embeddings"}
KEYS = BESIDE | HARMLESS | {key: value for name in EVERY for key, value in class_keys(name).items()}


def keys_of(name: str, change: str) -> dict[str, Any]:
    """Returns the keys that are tried for a family, with their defaults."""
    if name in EVERY:
        return KEYS
    own = {key: default for key, default in class_keys(name).items() if key not in GENERAL}
    return own | BESIDE if change == "away" else own


def away(key: str, value: Any) -> Any:
    """Returns a value for a key that is not `value`, but of its type."""
    if AWAY.get(key, value) != value:
        return AWAY[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return 1e3 * value if value < 1e-3 else 0.5
    return 1 if value is None else f"{value} away"


def base(folder: Path, name: str) -> dict[str, Any]:
    """Returns the config.json that transformers writes for a tiny model, with all keys of its class."""
    sizes = {"model_type": name, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 1} | SIZES[name]
    AutoConfig.for_model(**sizes).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in written.items() if key not in LISTS or key in sizes}


@cache
def noise() -> torch.Tensor:
    """Returns normal numbers, more than a tiny model has: drawing them anew for each model would take a fifth of it."""
    return torch.randn(1 << 22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def transformers_config(folder: Path, hf: dict[str, Any]) -> PreTrainedConfig | None:
    """Writes config.json; returns it as transformers reads it, or None if it refuses."""
    (folder / "config.json").write_text(json.dumps(hf))
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception:  # of a dozen kinds: its checks are spread over the class, the model and torch
        return None
    config._experts_implementation = "eager"  # their fast ones take no float64
    return config


def transformers_model(config: PreTrainedConfig | None) -> tuple[torch.nn.Module | None, torch.Tensor | None]:
    """Returns transformers' model with random weights and its logits, or None if it refuses."""
    at = 0
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            plain, size = parameter.dim() > 1 or name.endswith("bias"), parameter.numel()
            at = at if at + size <= len(noise()) else 0
            drawn, at = noise()[at : at + size].view_as(parameter), at + size
            parameter.data = drawn * (0.1 if parameter.dim() > 1 else 0.2) + (0.0 if plain else 1.0)
        with torch.no_grad():
            return model, in_float64(model).eval()(IDS, use_cache=False, return_dict=True).logits
    except Exception:
        return None, None


def our_logits(folder: Path, theirs: torch.nn.Module) -> torch.Tensor:
    """Returns the logits of a folder's model with transformers' weights."""
    tensors = revert_weight_conversion(theirs, theirs.state_dict())  # experts one by one, as save_pretrained does
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")
    with torch.no_grad():
        return build(folder, torch.float64)(IDS)


@dataclass
class Plain:
    """A config.json without changes, and the logits of both."""

    folder: Path
    hf: dict[str, Any]

    def __post_init__(self) -> None:
        read = transformers_config(self.folder, self.hf)
        self.read = copy.deepcopy(vars(read))  # before the model writes into it
        self.model, self.theirs = transformers_model(read)
        self.config, self.ours = read_config(self.folder)[1], our_logits(self.folder, self.model)

    def compare(self, hf: dict[str, Any], change: dict[str, Any]) -> tuple[str, torch.Tensor | None]:
        """Returns what is wrong with how we read a config.json with a change, and the logits if both could read it.

        Nothing is, if they equal those of transformers, or if we refuse the file and name a key of the change. What
        transformers refuses we may read, if it can be read at all.
        """
        inner = [key for value in change.values() if isinstance(value, dict) for key in value]
        read = transformers_config(self.folder, hf)
        try:
            config = read_config(self.folder)[1]
            same = read is not None and vars(read) == self.read  # then transformers computes the same
            model, want = (self.model, self.theirs) if same else transformers_model(read)
            if want is None:
                return "", None
            ours = self.ours if config == self.config else our_logits(self.folder, model)
        except UserError as refusal:
            named = any(key in str(refusal) for key in [*change, *inner])
            return "" if named else f"{change}: refused with {refusal}", None
        error = (ours - want).abs().max() / want.abs().max().clamp(min=1) if ours.shape == want.shape else "shapes"
        return "" if error != "shapes" and error <= 1e-6 else f"{change}: logits off by {error}", want


@pytest.mark.parametrize("change", ["absent", "null", "away"])
@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_every_class_means_what_it_means_in_transformers(name: str, change: str, tmp_path) -> None:
    plain = Plain(tmp_path, base(tmp_path, name))
    wrong, idle, compared, hf = [], set(), 0, plain.hf
    for key, default in keys_of(name, change).items():
        if change == "absent" and (key not in hf or key in (LARGE[:2] if name in EVERY else LARGE)):
            continue
        now = hf.get(CLASSES[name].attribute_map.get(key, key), default)
        given = BESIDE | HARMLESS
        other = given[key] if key in given and key not in hf else away(key, now)
        value = {"absent": "left out", "null": None, "away": other}[change]
        rest = {k: v for k, v in hf.items() if k != key}
        mistake, logits = plain.compare(rest if change == "absent" else rest | {key: value}, {key: value})
        wrong += [mistake] if mistake else []
        compared += logits is not None
        if logits is not None and torch.equal(logits, plain.theirs):
            idle.add(key)
    assert wrong == []
    assert compared > (len(hf) / 2 if name in EVERY else 3)  # the rest is refused by one side
    if change == "away":  # a key without effect here would hide a mistake
        assert idle & {field.name for field in fields(family(name).Keys)} <= {
            "max_position_embeddings",
            *IDLE.get(name, ()),
        }


ROPES = {
    "scaling beside parameters": {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 500.0}},
    "scaling beside parameters and theta": {"rope_scaling": LINEAR, "rope_theta": 500.0},
    "scaling and parameters agree": {"rope_scaling": LINEAR, "rope_parameters": LINEAR},
    "scaling with theta": {"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 500}, "rope_theta": 800.0},
    "default scaling beside linear": {"rope_scaling": {"type": "default"}, "rope_parameters": LINEAR},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "empty both": {"rope_scaling": {}, "rope_parameters": {}, "rope_theta": 500.0, "rotary_emb_base": 700.0},
    "theta inside and outside": {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 800.0, "rotary_emb_base": 9.0},
    "theta of two families": {"rope_parameters": None, "rope_theta": 800.0, "rotary_emb_base": 90.0},
    "type and rope_type": {"rope_parameters": LINEAR | {"type": "default"}},
    "rope_type and type": {"rope_parameters": LINEAR | {"rope_type": "default", "type": "linear"}},
    "factor below one": {"rope_parameters": LINEAR | {"factor": 0.5}},
    "factor of none": {"rope_parameters": {"rope_type": "default", "factor": None}},
    "no factor": {"rope_parameters": {"rope_type": "linear"}},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "llama3 without its length": {"rope_scaling": LLAMA3, "max_position_embeddings": 64},
    "llama3 of two lengths": {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64},
        "original_max_position_embeddings": 16,
    },
    "llama3 upside down": {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}},
    "llama3 of no width": {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
    "llama3 without high_freq_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
    "share inside and outside": {
        "rope_parameters": {"partial_rotary_factor": 0.5},
        "partial_rotary_factor": 0.25,
        "rotary_pct": 1.0,
    },
    "share with a scaling": {"rope_parameters": LINEAR, "partial_rotary_factor": 0.5, "rotary_pct": 0.5},
    "share of llama3": {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
    "odd share": {"rope_parameters": {"partial_rotary_factor": 0.2}, "rotary_pct": 0.2},
    "by layer type": {"rope_parameters": {"full_attention": LINEAR}, "layer_types": ["full_attention"] * 2},
    "by a layer type that is not said": {"rope_parameters": {"full_attention": LINEAR}},
    "list": {"rope_scaling": ["linear", 4.0]},
    "text": {"rope_parameters": "linear"},
    **{kind: {"rope_scaling": {"rope_type": kind, "factor": 4.0}} for kind in ("yarn", "dynamic", "proportional")},
    "longrope of one position": {"rope_parameters": longrope(1) | {"factor": 4.0}},
    "unknown": {"rope_scaling": {"rope_type": "other", "factor": 4.0}},
    "no kind": {"rope_parameters": {"rope_type": None}},
    "no theta": {"rope_parameters": {"rope_theta": None}},
}
SPELLINGS = {
    "agree": {"hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2},
    "disagree": {"hidden_size": 32, "n_head": 4, "num_attention_heads": 2, "n_positions": 512},
    "old dtype beside new": {"torch_dtype": "float16", "dtype": "float32"},
}


@pytest.mark.parametrize("name", NAMES)
def test_several_keys_that_say_the_same_are_read_as_transformers_reads_them(name: str, tmp_path) -> None:
    plain = Plain(tmp_path, base(tmp_path, name))
    cases = [*(ROPES.values() if name in OWN_ROPES else ()), *SPELLINGS.values()]
    assert [mistake for case in cases if (mistake := plain.compare(plain.hf | case, case)[0])] == []


@pytest.mark.parametrize("name", NAMES)
def test_keys_have_the_names_types_and_defaults_of_transformers_class(name: str) -> None:
    theirs = {field.name: field for field in fields(CLASSES[name])}
    general = {field.name for field in fields(ConfigKeys)}
    for field in fields(family(name).Keys):
        if field.type in (None, NoneType) or field.name in general:  # a key of another class, which must not be there
            assert field.name not in theirs
        else:
            assert theirs[field.name].default == field.default
            assert theirs[field.name].type == field.type or get_origin(field.type) is Literal
    assert CLASSES[name].attribute_map == family(name).Keys.ALIASES


WRONG = [0, -1, "8", "true", [], {}, [8], math.inf, math.nan, -0.5, None]
NUMBERS = [*WRONG[:-1], True, 10**400]
WRONG_FOR = {
    float | int: [*NUMBERS, None],
    float | None: NUMBERS,
    float | int | None: NUMBERS,
    int: [*WRONG, 1.5, 64.0, True, 1 << 40],
    float: [*WRONG, True, 10**400],
    bool: [*WRONG, 1, 1.0],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_type_is_refused_by_its_key(name: str, tmp_path) -> None:
    hf = base(tmp_path, name)
    zero = {field.name for field in fields(family(name).Keys) if field.metadata == OR_ZERO}
    rope = [("rope_parameters", key, WRONG_FOR[float]) for key in ("rope_theta", "factor")]
    rope = [] if name in ("gpt2", "nemotron_h") else rope  # which have no rotary positions
    keys = [("", key, WRONG_FOR.get(kind, [8.5, "x", [], {"a": 1}])) for _, key, kind in family(name).Keys.spelt(hf)]
    for inside, key, values in keys + rope:
        for value in values:
            if (key, value) == ("mlp_only_layers", []):  # which Qwen's files have
                continue
            if key in zero and type(value) is int and value == 0:
                continue
            inner = LINEAR | {key: value}
            inner = {"full_attention": inner} if hasattr(family(name), "THETAS") else inner
            changed = hf | ({inside: inner} if inside else {key: value})
            (tmp_path / "config.json").write_text(json.dumps(changed))
            with pytest.raises(UserError, match=rf"config.json: \S*{key}.* not supported"):
                read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "default"),
    [
        ("llama", "intermediate_size", 11008),
        ("llama", "num_hidden_layers", 32),
        ("gpt_neox", "attention_bias", True),
        ("gpt2", "n_positions", 1024),
        ("gpt2", "tie_word_embeddings", True),
    ],
)
def test_weights_that_do_not_fit_a_default_name_the_key_that_is_left_out(name, key, default, tmp_path) -> None:
    hf = base(tmp_path, name) | ({key: False} if default is True else {})
    our_logits(tmp_path, transformers_model(transformers_config(tmp_path, hf))[0])
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if k != key}))
    with pytest.raises(UserError, match=rf"config.json, which leaves out {key} \(then {default}\),"):
        build(tmp_path, torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_that_a_config_may_name_is_that_of_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert torch.allclose(FUNCTIONS[ACTIVATIONS[name]](x), ACT2FN[name](x), rtol=0, atol=1e-9)
