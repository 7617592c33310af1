"""Model families: one file each, with `config(hf)`, which returns a ModelConfig, and NAMES, the two-way name map."""

import re
from importlib import import_module
from types import ModuleType

FAMILIES = {
    "llama": "litpeft.families.llama",
    "mistral": "litpeft.families.llama",
}


def family(name: str) -> ModuleType:
    """Returns the module of a family by the `model_type` of its config.json."""
    return import_module(FAMILIES[name])


def renamed(name: str, names: dict[str, str]) -> str | None:
    """Returns a parameter's name on the other side of `names`, or None if the map does not know it.

    `names` maps modules, with `{}` for the layer's number; the last part (weight, bias) stays:
    `blocks.3.attn.q.weight` <-> `model.layers.3.self_attn.q_proj.weight`.
    """
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"(?<=\.)\d+(?=\.)", module)
    key = module if layer is None else f"{module[: layer.start()]}{{}}{module[layer.end() :]}"
    other = names.get(key)
    return None if other is None else f"{other.format(layer.group() if layer else '')}.{leaf}"


def inverse(names: dict[str, str]) -> dict[str, str]:
    """Returns the map of Hugging Face names to ours."""
    return {theirs: ours for ours, theirs in names.items()}
