"""What a run learned as an adapter of peft: adapter_config.json and adapter_model.safetensors.

What each Delta is for peft it says itself (`Delta.peft`); here these are put under the names of the base's files, as
one of peft's kinds. Of the base's weights none are read but the rows of tokens that the run adds.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft.core.checksums import hub_origin
from litpeft.core.errors import some
from litpeft.core.exports import CannotExport
from litpeft.core.folders import COMPANIONS
from litpeft.core.json import read_json, write_json
from litpeft.core.recognise import ADAPTER, ADAPTER_TENSORS
from litpeft.core.safetensors import Weights, copy_companions, save_tensors
from litpeft.data.tokenizer import write_added_tokens
from litpeft.exchange.chat_template import write_beside
from litpeft.exchange.exports.peft_base import WRAPPED, Adapter, add_base, plain_modules
from litpeft.exchange.exports.peft_tokens import add_rows, note_ids, taken_out
from litpeft.exchange.result import Run
from litpeft.model.build import deltas_alone
from litpeft.model.config import ModelConfig
from litpeft.model.delta import Method, pattern
from litpeft.model.families import family, split_name
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.slots import Delta, Linear, Slot

SHARED = {"vera_A", "vera_B"}  # by all layers
LORA, IA3 = {"lora_A", "lora_B"}, {"ia3_l"}
DORA, VERA = LORA | {"lora_magnitude_vector"}, SHARED | {"vera_lambda_d", "vera_lambda_b"}
Said = dict[str, Tensor]  # tensors by peft's names


def write(folder: Path, run: Run, base: Path) -> str:
    """Writes the adapter of a run, and the tokenizer beside it; returns a line that says what it is."""
    said = write_adapter(folder, run.method(), run.storage, run.delta(), base)
    tokenizer, template = run.tokenizer_and_template(base)
    copy_companions(run.texts(base), folder, COMPANIONS[2:])
    write_added_tokens(folder, tokenizer)
    return said + write_beside(folder, template)


def write_adapter(
    folder: Path,
    method: Method,
    storage: Storage | None,
    delta: Mapping[str, Tensor],
    base: Path,
    most: float = math.inf,
) -> str:
    """Writes what a method learned as an adapter; raises CannotExport if peft cannot say it in `most` bytes."""
    adapter = adapter_of(method, storage, delta, base, most)
    config = {"peft_type": None, "task_type": "CAUSAL_LM", **base_name(base), "inference_mode": True} | adapter.config
    write_json(folder / ADAPTER, config)
    save_tensors(adapter.tensors, folder / ADAPTER_TENSORS)
    return f"{config['peft_type']}, {len(adapter.tensors)} tensors"


def base_name(base: Path) -> dict[str, Any]:
    """Returns the base's name and revision on the hub if `litpeft download` fetched it from there, or else its path."""
    if origin := hub_origin(base):
        return {"base_model_name_or_path": origin[0], "revision": origin[1]}
    return {"base_model_name_or_path": str(base.resolve()), "revision": None}


def adapter_of(
    method: Method, storage: Storage | None, delta: Mapping[str, Tensor], base: Path, most: float = math.inf
) -> Adapter:
    """Returns what a method learned as an adapter; raises CannotExport if peft cannot say it in `most` bytes."""
    hf = read_json(base / "config.json", "config.json of the base")
    method.configure(changed := deepcopy(hf))
    if changed != hf:
        keys = sorted(key for key in changed if changed[key] != hf.get(key))
        raise CannotExport(f"it changes {some(keys)} in config.json, which an adapter does not have")
    names = NameMap(*config_of(hf, str(base)))
    note_ids(method, base, names.config.vocab_size)
    model = deltas_alone(names.config, method, storage, dict(delta))
    rows = taken_out(model)
    slots = {place: slot for place, slot in model.named_modules() if isinstance(slot, Slot) and slot.deltas}
    said: dict[str, tuple[Said, float]] = {}
    for place, slot in slots.items():
        if (parts := spoken(place, slot, storage)) is not None:
            said[place] = parts
            most -= sum(tensor.nbytes for name, tensor in parts[0].items() if name not in SHARED)
        if most < 0:
            raise CannotExport("as an adapter of peft it would be far larger than it is here")
    trained = {name: delta[name] for name in model.base_values}
    if any("prompt_embeddings" in parts for parts, _ in said.values()):
        if rows:
            raise CannotExport("it adds tokens beside what stands before the text, and peft has one kind in a folder")
        return prompt(model, {place: parts for place, (parts, _) in said.items()}, trained)
    said = {place.removesuffix(".slot"): parts for place, parts in said.items()}
    return add_rows(beside_layers(model, said, trained, names), rows, method.token_ids, Weights(base), names)


@torch.no_grad()
def spoken(place: str, slot: Slot, storage: Storage | None) -> tuple[Said, float] | None:
    """Returns the tensors of a slot under peft's names, and the scale of its update; None for an empty one."""
    deltas = [delta for delta in slot.deltas.values() if not delta.vanishes]
    for delta in deltas:
        if storage is not None and type(delta).off is not Delta.off:
            raise CannotExport(f"its base is held in {storage.name} with codes that were chosen for what it learned")
    found = [delta.peft() for delta in deltas]
    if None in found:
        other = type(deltas[found.index(None)])
        raise CannotExport(other.unlike_peft or f"peft has nothing like {other.__name__} at {place}")
    if len(found) > 1:
        if any(parts.keys() != LORA for parts in found):
            what = f"{' and '.join(slot.deltas)} act on the same layer, {place}"
            raise CannotExport(f"{what}, and a folder of peft has one kind: each in a run of its own is an adapter")
        a = torch.cat([parts["lora_A"] for parts in found])
        b = torch.cat([delta.scale * parts["lora_B"] for delta, parts in zip(deltas, found, strict=True)], 1)
        return {"lora_A": a, "lora_B": b}, 1.0
    if not found:
        return None
    return found[0], deltas[0].scale if "lora_B" in found[0] else 1.0


def prompt(model: GPT, said: Mapping[str, Said], base: Mapping[str, Tensor]) -> Adapter:
    """Returns an adapter of vectors before the text, or of keys and values before it in every block."""
    if base or any(parts.keys() != {"prompt_embeddings"} for parts in said.values()):
        raise CannotExport("it learned more than what stands before the text, and peft has one kind in a folder")
    vectors, config = [parts["prompt_embeddings"] for parts in said.values()], model.config
    keys = [f"blocks.{layer}.attn.{leaf}.slot" for layer in range(config.n_layers) for leaf in "kv"]
    kind, width, heads = "PROMPT_TUNING", config.d_model, config.n_heads
    if "after_embed" not in said:
        if [*said] != keys:
            raise CannotExport("keys and values stand before the text in some blocks only")
        if (step := step_of_keys(config)) is not None:
            raise CannotExport(f"its keys and values go through {step} of this model, and those of peft come after it")
        kind, width, heads = "PREFIX_TUNING", config.n_kv_heads * config.head_dim, config.n_kv_heads
    if any(one.size(1) != width for one in vectors):
        raise CannotExport("keys and values are not of one size in all blocks, and peft has one for all")
    facts = {
        "peft_type": kind,
        "num_virtual_tokens": len(vectors[0]),
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": config.n_layers,
    }
    facts |= {"prefix_projection": False, "encoder_hidden_size": width} if kind == "PREFIX_TUNING" else {}
    return Adapter(facts, {"prompt_embeddings": torch.cat(vectors, 1)})


def step_of_keys(config: ModelConfig) -> str | None:
    """Returns what keys and values go through, beside their positions, before attention reads them; None: nothing."""
    if config.qk_norm is not None or config.value_norm:
        return "norms"
    if config.clip_qkv is not None:
        return "a clamp"
    ropes = [config.layer(layer).rope for layer in range(config.n_layers)]
    scalings = [rope.scaling for rope in ropes if rope is not None and rope.scaling is not None]
    return "a scale of rotary positions" if any(one.attention_factor != 1 for one in scalings) else None


def beside_layers(
    model: GPT, said: Mapping[str, tuple[Said, float]], base: Mapping[str, Tensor], names: NameMap
) -> Adapter:
    """Returns an adapter of updates of linear layers, and of parameters of the base that trained."""
    if any(parts.keys() == VERA for parts, _ in said.values()) and not alone(said, names):
        sizes = {place: model.get_submodule(place).weight.shape for place in said}
        said = {place: (as_lora(parts, *sizes[place]), scale) for place, (parts, scale) in said.items()}
    kinds = {frozenset(parts) for parts, _ in said.values()}
    if len(kinds) > 1 or not all(isinstance(model.get_submodule(place), Linear) for place in said):
        raise CannotExport("it learned in more ways than one, and peft has one kind in a folder")
    if inside := [place for place in said if len(split_name(f"{place}.weight")[1]) > 1]:
        raise CannotExport(f"it changes {inside[0]}, and transformers holds all experts of a layer in one tensor")
    modules: dict[str, tuple[Said, float]] = {}
    for theirs, parts in names.parts.items():
        given = {part: said[part.removesuffix(".weight")] for part in parts if part.removesuffix(".weight") in said}
        if given:
            modules[names.module(parts[0].removesuffix(".weight"))] = fused(theirs, given, names)
    if not modules:
        return plain_modules(base, names)
    if kinds <= {frozenset(LORA), frozenset(DORA)}:
        refuse_modules(said, names)
    tensors = {
        f"base_model.{name}"
        if name in SHARED
        else f"{WRAPPED}{module}.{name}{'.weight' if name in LORA else ''}": tensor
        for module, (parts, _) in modules.items()
        for name, tensor in parts.items()
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    config = {
        "target_modules": targets(list(modules), names, linear),
        "fan_in_fan_out": any(names.transposed(names.file_name(f"{place}.weight")) for place in said),
        "modules_to_save": None,
    }
    if kinds == {frozenset(IA3)}:
        config |= {"peft_type": "IA3", "feedforward_modules": []}
    elif kinds == {frozenset(VERA)}:
        config |= {"peft_type": "VERA", "r": len(tensors["base_model.vera_A"]), "save_projection": True}
    else:
        config |= {"peft_type": "LORA", "use_dora": kinds == {frozenset(DORA)}, "bias": "none", **ranks(modules)}
    add_base(config, tensors, base, modules, names)
    return Adapter(config, tensors)


def refuse_modules(places: Iterable[str], names: NameMap) -> None:
    """Raises if there is a layer on which peft refuses LoRA in models of this family."""
    refused = getattr(family(names.family), "NOT_IN_PEFT", ())
    if found := [place for place in places if names.module(place).rpartition(".")[2] in refused]:
        what = f"peft takes no LoRA of {names.module(found[0])} in models of {names.family}"
        raise CannotExport(f"{what}: a run whose method.targets do not name {pattern(found[0])} is an adapter")


def alone(said: Mapping[str, tuple[Said, float]], names: NameMap) -> bool:
    """Returns whether all deltas are of one kind, in layers that the base's files do not fuse."""
    parts = [names.parts[names.file_name(f"{place}.weight")] for place in said]
    return len({frozenset(tensors) for tensors, _ in said.values()}) == 1 and max(map(len, parts)) == 1


def as_lora(said: Said, outputs: int, inputs: int) -> Said:
    """Returns what scales shared matrices as matrices of its own."""
    if said.keys() != VERA:
        return said
    a, b = said["vera_A"][:, :inputs], said["vera_B"][:outputs]
    return {"lora_A": said["vera_lambda_d"][:, None] * a, "lora_B": said["vera_lambda_b"][:, None] * b}


def fused(theirs: str, given: Mapping[str, tuple[Said, float]], names: NameMap) -> tuple[Said, float]:
    """Returns the update of one tensor of the base's files from those of the parameters that it holds."""
    parts = names.parts[theirs]
    if len(parts) == 1:
        [(said, scale)] = given.values()
        return {name: t[:, None] if name == "ia3_l" else t for name, t in said.items()}, scale
    rows = {part: names.ours[part][0] for part in parts}
    kind = next(iter(given.values()))[0].keys()
    if kind == IA3:
        gains = {part: given[part][0]["ia3_l"] if part in given else torch.ones(rows[part]) for part in parts}
        return {"ia3_l": names.joined_rows(theirs, gains)[:, None]}, 1.0
    if kind == DORA and given.keys() != rows.keys():
        raise CannotExport(
            f"the base's files hold {', '.join(parts)} in one, and it trained magnitudes of some of them"
        )
    scales = {scale for _, scale in given.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0  # of the whole; the rest is put into B
    a = torch.cat([said["lora_A"] for said, _ in given.values()])
    b, at = {part: torch.zeros(count, len(a), dtype=a.dtype) for part, count in rows.items()}, 0
    for part, (said, own) in given.items():  # each reads its own rows of A
        rank = len(said["lora_A"])
        b[part][:, at : at + rank] = own / scale * said["lora_B"]
        at += rank
    joined = {"lora_A": a, "lora_B": names.joined_rows(theirs, b)}
    if kind == DORA:
        norms = {part: said["lora_magnitude_vector"] for part, (said, _) in given.items()}
        joined["lora_magnitude_vector"] = names.joined_rows(theirs, norms)
    return joined, scale


def targets(modules: list[str], names: NameMap, linear: set[str]) -> list[str]:
    """Returns what target_modules must say: last parts of names if they fit no other linear layer, or whole names."""
    leaves = {module.rpartition(".")[2] for module in modules}
    same = {module for ours in linear if (module := names.module(ours)).rpartition(".")[2] in leaves}
    return sorted(leaves if same == {*modules} else modules)


def ranks(modules: Mapping[str, tuple[Said, float]]) -> dict[str, Any]:
    """Returns r and lora_alpha with their patterns: the scale of an update is lora_alpha / r."""
    found = {module: (len(parts["lora_A"]), scale) for module, (parts, scale) in modules.items()}
    (rank, scale), _ = Counter(found.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": plain(scale * rank),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {module: own for module, (own, _) in found.items() if own != rank},
        "alpha_pattern": {module: plain(s * own) for module, (own, s) in found.items() if s * own != scale * rank},
    }


def plain(number: float) -> float:
    """Returns a whole number as int, as peft and its readers write it."""
    return int(number) if float(number).is_integer() else float(number)
