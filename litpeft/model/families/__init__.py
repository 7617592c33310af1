"""Model families, one file each: Keys, which transformers' class reads of a config.json; `config(hf)`, which returns a
ModelConfig; and NAMES, the two-way name map, or `names(config)`, which returns it.

NAMES maps our modules to those of the files, with `{}` for the number of the layer and of the expert; weight and bias
follow. A value is the name of a module whose tensors are as ours, or a `Place`. A family may also have these tables:

- BUFFERS: globs of names of tensors in its files that are not weights.
- OTHER_PREFIXES: files may begin a name otherwise than NAMES does. Maps the prefix in NAMES to the other one.
- MODULES: since version 5 transformers has other names for some modules. Maps the files' name, or its first parts, to
  the new one.
- NOT_IN_PEFT: last parts of names of modules on which peft refuses LoRA in this family.
- ROPE_NAMES: maps rope_theta and partial_rotary_factor to their names in older files.
- GGUF: the family's name and switches in llama.cpp.
- DEVIATION: of its weights before any training, where config.json says no initializer_range; default 0.02.
- INITIAL: maps globs of our parameters to functions that draw them before any training, from their shape, the
  config.json and a torch.Generator, where model/initial.py has another way.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType
from typing import Any

FAMILIES = {
    "llama": "litpeft.model.families.llama",
    "mistral": "litpeft.model.families.mistral",
    "qwen2": "litpeft.model.families.qwen2",
    "qwen3": "litpeft.model.families.qwen3",
    "qwen3_5_text": "litpeft.model.families.qwen3_5_text",
    "gemma4_text": "litpeft.model.families.gemma4_text",
    "gemma3_text": "litpeft.model.families.gemma3_text",
    "gemma2": "litpeft.model.families.gemma2",
    "gemma": "litpeft.model.families.gemma",
    "phi3": "litpeft.model.families.phi3",
    "phi": "litpeft.model.families.phi",
    "smollm3": "litpeft.model.families.smollm3",
    "olmo3": "litpeft.model.families.olmo3",
    "olmo2": "litpeft.model.families.olmo2",
    "olmo": "litpeft.model.families.olmo",
    "granite": "litpeft.model.families.granite",
    "granitemoe": "litpeft.model.families.granitemoe",
    "granitemoehybrid": "litpeft.model.families.granitemoehybrid",
    "ministral3": "litpeft.model.families.ministral3",
    "ministral": "litpeft.model.families.ministral",
    "glm4_moe": "litpeft.model.families.glm4_moe",
    "glm4": "litpeft.model.families.glm4",
    "glm": "litpeft.model.families.glm",
    "hunyuan_v1_dense": "litpeft.model.families.hunyuan_v1_dense",
    "ernie4_5_moe": "litpeft.model.families.ernie4_5_moe",
    "ernie4_5": "litpeft.model.families.ernie4_5",
    "exaone4": "litpeft.model.families.exaone4",
    "seed_oss": "litpeft.model.families.seed_oss",
    "apertus": "litpeft.model.families.apertus",
    "bamba": "litpeft.model.families.bamba",
    "falcon_h1": "litpeft.model.families.falcon_h1",
    "falcon": "litpeft.model.families.falcon",
    "stablelm": "litpeft.model.families.stablelm",
    "starcoder2": "litpeft.model.families.starcoder2",
    "cohere2": "litpeft.model.families.cohere2",
    "cohere": "litpeft.model.families.cohere",
    "nemotron_h": "litpeft.model.families.nemotron_h",
    "nemotron": "litpeft.model.families.nemotron",
    "mixtral": "litpeft.model.families.mixtral",
    "qwen2_moe": "litpeft.model.families.qwen2_moe",
    "qwen3_moe": "litpeft.model.families.qwen3_moe",
    "qwen3_5_moe_text": "litpeft.model.families.qwen3_5_moe_text",
    "qwen3_next": "litpeft.model.families.qwen3_next",
    "olmoe": "litpeft.model.families.olmoe",
    "gpt_oss": "litpeft.model.families.gpt_oss",
    "deepseek_v3": "litpeft.model.families.deepseek_v3",
    "deepseek_v2": "litpeft.model.families.deepseek_v2",
    "lfm2_moe": "litpeft.model.families.lfm2_moe",
    "lfm2": "litpeft.model.families.lfm2",
    "gpt_neox": "litpeft.model.families.gpt_neox",
    "gpt2": "litpeft.model.families.gpt2",
}
IMAGES = "it reads images, and its text model is of a family that is not supported"
TEXT = "it reads images: `litpeft convert FOLDER OUT` takes its text model out"
OTHERS = {  # model_type of models that are known, and why they are not here
    "gemma3": TEXT,
    "mistral3": TEXT,
    "gemma4": TEXT,
    "qwen3_5": TEXT,
    "qwen3_5_moe": TEXT,
    "llama4": IMAGES,
    "deepseek_v32": "its indexer (index_topk), which picks the keys that a token sees, is not built; take DeepSeek-V3",
}


@dataclass(frozen=True)
class Place:
    """Where a module's tensors lie in the files, if not alone or not as they are.

    Modules of one layer with the same `module` are fused there, in the order of their lines in NAMES. With `per` None
    all rows of the first module come first, then all of the second: q q k k v v. Else `per` is a field of ModelConfig
    with a number of groups, such as "n_heads", and each group has rows of every module: q k v q k v.
    """

    module: str
    per: str | None = None
    transposed: bool = False  # the files hold a weight as (in, out)
    stack: bool = False  # the files hold one tensor for all experts, called `module` and `module`_bias


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp has a family. Names of tensors follow from NAMES by the tables of the `gguf` package.

    A field of ModelConfig that neither the header says nor `graph` lists must have its default.
    """

    arch: str  # the family's name there
    pairs: bool = False  # RoPE rotates neighbouring rows of q and k, which the file holds in that order
    own_head: bool = False  # the file needs a head even if that is the embedding
    yarn_truncates: bool = True  # False: its models do not round yarn's bounds, though llama.cpp does
    yarn_multiplier: float = 0.0  # rope.scaling.yarn_log_multiplier is so many times mscale_all_dim
    only: tuple[str, Any] | None = None  # key of the header and its value, if others have the same name
    ignores: tuple[str, ...] = ()  # globs of our linear layers that llama.cpp adds no adapter to
    refuses: Callable[[Any], str | None] = lambda config: None  # returns why a config cannot be written, if so
    norms: float = 0.0  # what the file's norms have added to ours
    names: Mapping[str, str] = field(default_factory=dict)  # module of ours -> tensor, where the tables have none
    values_in_turn: bool = False  # linear attention: the first value head of each key head, then the second of each
    # key of the header, without `arch.` -> field of ModelConfig, or that ("": all of it) and a function of its value
    keys: Mapping[str, str | tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)
    # field -> values that llama.cpp computes with, or a function of the config that returns them
    graph: Mapping[str, Any] = field(default_factory=dict)
    # the header of a file -> keys of config.json that follow from its sizes and tensors
    implied: Callable[[Any], Mapping[str, Any]] = lambda header: {}
    hybrid: "Gguf | None" = None  # how it has those with layers of Mamba, if it has another name for them

    def of(self, config: Any) -> "Gguf":
        """Returns how llama.cpp has a model of this config."""
        return self.hybrid if self.hybrid and any(layer.state_space for layer in config.layers) else self

    def named(self, arch: str) -> "Gguf":
        """Returns the one of this name."""
        return self.hybrid if self.hybrid and self.hybrid.arch == arch else self

    def key(self, name: str) -> tuple[str, Callable[[Any], Any]]:
        """Returns the field of ModelConfig that a key of the header says, and what it makes of its value."""
        said = self.keys[name]
        return (said, lambda value: value) if isinstance(said, str) else said


EXPERTS = {  # keys of every family with experts
    "expert_count": ("experts", lambda experts: experts.number),
    "expert_used_count": ("experts", lambda experts: experts.active),
}
OWN_SIZE = {"expert_feed_forward_length": ("experts", lambda experts: experts.d_ff)}
SHARED_SIZE = {"expert_shared_feed_forward_length": ("experts", lambda experts: experts.shared_d_ff)}


def in_all_layers(normed: bool, **switches: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Returns which experts llama.cpp computes with: in each layer, with shares that sum to 1 or not."""
    return lambda config: (replace(config.experts, normed=normed, dense_layers=(), **switches),)


def usual_heads(config: Any) -> tuple[int]:
    """Returns the one size of heads that llama.cpp builds for some families, whatever the header says."""
    return (config.d_model // config.n_heads,)


def window_of(layers: tuple[Any, ...]) -> int | None:
    """Returns the window of those layers that have one."""
    return next((layer.window for layer in layers if layer.window is not None), None)


def alternating(config: Any, period: int) -> tuple[Any, ...]:
    """Returns the layers that llama.cpp builds: of so many in turn only the last sees all tokens."""
    fits = all((layer.window is None) == (at % period == period - 1) for at, layer in enumerate(config.layers))
    return ((), config.layers) if fits else ((),)


def family(name: str) -> ModuleType:
    """Returns the module of a family by the `model_type` of its config.json."""
    return import_module(FAMILIES[name])


def without(names: dict[str, str | Place], glob: str) -> dict[str, str | Place]:
    """Returns a name map without the modules of ours that match, which a family has otherwise."""
    return {ours: theirs for ours, theirs in names.items() if not fnmatchcase(ours, glob)}


def split_name(name: str) -> tuple[str, tuple[str, ...], str]:
    """Returns the module with `{}` for its numbers, the numbers and the leaf: `blocks.{}.attn.q`, `3` and `weight`."""
    number = r"(?<=\.)\d+(?=\.)"
    module, _, leaf = re.sub(number, "{}", name).rpartition(".")
    return module, tuple(re.findall(number, name)), leaf
