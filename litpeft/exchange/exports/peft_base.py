"""The parameters of the base that trained, in an adapter of peft."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from litpeft.core.errors import some
from litpeft.core.exports import CannotExport
from litpeft.model.families.names import NameMap

WRAPPED = "base_model.model."  # what peft puts before the name of a module


@dataclass
class Adapter:
    """The content of the two files of an adapter."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def by_module(base: Mapping[str, Tensor], names: NameMap) -> dict[str, dict[str, Tensor]]:
    """Returns the trained parameters of the base as its files hold them: tensors by module and leaf."""
    found: dict[str, dict[str, Tensor]] = {}
    for theirs, parts in names.parts.items():
        given = {part: base[part] for part in parts if part in base}
        if not given:
            continue
        if len(given) < len(parts):
            missing = [part for part in parts if part not in base]
            raise CannotExport(f"the base's files hold {theirs} in one, of which {some(missing)} did not train")
        ours, _, leaf = parts[0].rpartition(".")
        found.setdefault(names.module(ours), {})[leaf] = names.joined(theirs, given)
    return found


def whole(module: str, found: Mapping[str, Tensor], names: NameMap) -> bool:
    """Returns whether these are all tensors of a module of the files."""
    theirs = names.in_files(module)
    return all(f"{theirs}.{leaf}" not in names.parts or leaf in found for leaf in ("weight", "bias"))


def plain_modules(base: Mapping[str, Tensor], names: NameMap) -> Adapter:
    """Returns an adapter of modules that trained whole, such as norms."""
    modules = by_module(base, names)
    for module, found in modules.items():
        if not whole(module, found, names):
            raise CannotExport(f"of {module} it trained {', '.join(found)} alone, and peft has no such kind")
        if module == names.module("embed") and names.config.tie_embeddings:
            raise CannotExport(f"it trained {module}, which is the head too")
    tensors = {
        f"{WRAPPED}{module}.ln_tuning_layers.{leaf}": tensor
        for module, found in modules.items()
        for leaf, tensor in found.items()
    }
    return Adapter({"peft_type": "LN_TUNING", "target_modules": sorted(modules), "modules_to_save": None}, tensors)


def add_base(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    base: Mapping[str, Tensor],
    targeted: Container[str],
    names: NameMap,
) -> None:
    """Adds trained parameters of the base: whole modules as modules_to_save, and biases as `bias`."""
    saved = []
    for module, found in by_module(base, names).items():
        if module not in targeted and whole(module, found, names):
            saved.append(module)
        elif [*found] != ["bias"] or "bias" not in config:
            raise CannotExport(
                f"it trained {' and '.join(found)} of {module}, which peft does not train beside the rest"
            )
        else:
            config["bias"] = "all"
        place = f"{module}.base_layer" if module in targeted else module
        tensors |= {f"{WRAPPED}{place}.{leaf}": tensor for leaf, tensor in found.items()}
    if saved:
        config["modules_to_save"] = saved
    if names.module("embed") in saved and names.config.tie_embeddings:
        config["ensure_weight_tying"] = True
        tensors[f"{WRAPPED}{names.module('head')}.weight"] = base["embed.weight"]
