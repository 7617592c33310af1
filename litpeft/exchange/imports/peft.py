"""An adapter of peft, read as a run: adapter_config.json and adapter_model.safetensors (or .bin) beside a base.

Every key of adapter_config.json is honoured, is without effect on what a finished adapter computes (IDLE), or must be
off: null, false or empty. Which modules an adapter has is decided by the config, as peft does it, and must be what the
file of tensors holds.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.checksums import read_header
from litpeft.core.errors import ConfigError, ModelError, some
from litpeft.core.json import read_json
from litpeft.core.recognise import ADAPTER, ADAPTER_TENSORS, FOLD, refuse_other
from litpeft.core.safetensors import DTYPES, Weights
from litpeft.core.terminal import command_line
from litpeft.core.typed import LATER, typed
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.result import Run
from litpeft.methods.dora import DoRA
from litpeft.methods.ia3 import IA3
from litpeft.methods.lora import LARGEST_RANK, LoRA
from litpeft.methods.prefix import Prefix
from litpeft.methods.prompt import Prompt
from litpeft.model.build import checked_files
from litpeft.model.delta import Method, attach
from litpeft.model.families.names import NameMap
from litpeft.model.gpt import GPT
from litpeft.model.slots import Linear

FILES = (ADAPTER_TENSORS, "adapter_model.bin")
WRAPPED = "base_model.model."
IDLE = {  # keys without effect on what a finished adapter computes
    *("auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "init_ia3_weights"),
    *("lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "encoder_hidden_size", "encoder_dropout", "encoder_num_layers"),
    *("encoder_reparameterization_type", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    *("tokenizer_name_or_path", "init_weights", "use_cache"),
}
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of A and B, which leave the base's weights alone


def later(default: Any) -> Any:
    return field(default=default, metadata=LATER)


@dataclass
class Keys:
    """What every kind of adapter has in its config."""

    peft_type: Literal["LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
    base_model_name_or_path: str | None = later(None)
    task_type: Literal["CAUSAL_LM"] | None = later(None)


@dataclass
class Layers(Keys):
    """Keys of a kind that acts on layers."""

    target_modules: tuple[str, ...] | str | None = later(None)
    exclude_modules: tuple[str, ...] | str | None = later(None)
    modules_to_save: tuple[str, ...] | None = later(None)

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("target_modules must be a list of names or a regular expression, got none")
        for key in ("target_modules", "exclude_modules"):
            check_pattern(key, getattr(self, key))


@dataclass
class LoraKeys(Layers):
    r: int = later(8)
    lora_alpha: float = later(8.0)
    rank_pattern: dict[str, int] | None = later(None)
    alpha_pattern: dict[str, float] | None = later(None)
    use_rslora: bool = later(False)
    use_dora: bool = later(False)
    bias: Literal["none", "all", "lora_only"] = later("none")
    init_lora_weights: bool | str | None = later(True)
    layers_to_transform: tuple[int, ...] | int | None = later(None)
    layers_pattern: tuple[str, ...] | str | None = later(None)
    ensure_weight_tying: bool = later(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            if not 1 <= rank <= LARGEST_RANK:
                raise ValueError(f"{name} must be a rank of at least 1 and at most {LARGEST_RANK}, got {rank}")
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key) or {}:
                check_pattern(key, pattern)
        if self.init_lora_weights not in PLAIN_STARTS:
            what = f"init_lora_weights {self.init_lora_weights!r} changes the base's weights when peft begins"
            raise ValueError(f"{what}; save it with path_initial_model_for_weight_conversion")

    def rank(self, module: str) -> int:
        return by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Returns what B A x of a module is multiplied by."""
        rank = self.rank(module)
        return by_pattern(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


@dataclass
class Ia3Keys(Layers):
    feedforward_modules: tuple[str, ...] | str | None = later(None)


@dataclass
class PromptKeys(Keys):
    num_virtual_tokens: int = later(0)
    token_dim: int | None = later(None)
    num_transformer_submodules: int | None = later(None)
    num_attention_heads: int | None = later(None)
    num_layers: int | None = later(None)
    prefix_projection: bool = later(False)


KINDS = {
    "LORA": LoraKeys,
    "IA3": Ia3Keys,
    "PREFIX_TUNING": PromptKeys,
    "PROMPT_TUNING": PromptKeys,
    "P_TUNING": PromptKeys,
}


def check_pattern(key: str, pattern: Any) -> None:
    """Raises a ValueError if a regular expression is none."""
    try:
        re.compile(pattern if isinstance(pattern, str) else "")
    except re.error as error:
        raise ValueError(f"{key} {pattern[:60]!r} is no regular expression: {error}") from None


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that the end of a module's name matches."""
    hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(hits, default)


def read_keys(folder: Path) -> Keys:
    """Returns the config of an adapter; an error names the key that is not honoured."""
    path = folder / ADAPTER
    given = read_json(path, f"{ADAPTER} of peft")
    kind = given.get("peft_type")
    if kind not in KINDS:
        raise ModelError(f"peft_type {str(kind)[:40]!r} is not read; {', '.join(KINDS)} are", where=path, hint=FOLD)
    known = {one.name for one in fields(KINDS[kind])}
    for key, value in given.items():
        if key not in known and key not in IDLE and value not in (None, False, [], {}):
            what = f"{key[:60]} {str(value)[:60]!r} is not supported for {kind}; it must be null, false or empty"
            raise ModelError(what, where=path, hint=FOLD)
    try:
        return typed(KINDS[kind], {key: value for key, value in given.items() if key in known}, "")
    except ValueError as error:
        raise ModelError(str(error), where=path) from None


@dataclass
class PeftRun(Run):
    """An adapter of peft: a run whose facts are not recorded."""

    keys: Keys
    learned: tuple[Method, dict[str, Tensor]] | None = None  # set with the base

    @classmethod
    def read(cls, folder: Path) -> "PeftRun":
        facts = {
            "holds": "delta",
            "method": "peft",
            "base": {"storage": None},
            "precision": "32-true",
            "template": {"name": "auto", "system": None},
        }
        return cls(folder, facts, read_keys(folder))

    def check_files(self) -> None:
        """The tensors are checked as they are read."""

    def progress(self) -> None:
        """Nothing is known of its training."""

    def base_folder(self, moved_to: str | None = None) -> Path:
        """Returns the base's folder: `moved_to`, or where the config says, or where `litpeft download` puts it."""
        named = self.keys.base_model_name_or_path
        places = [moved_to] if moved_to else [named, f"checkpoints/{named}"] if named else []
        folder = next((Path(place) for place in places if "\0" not in place and Path(place).is_dir()), None)
        if folder is None:
            what = f"its base model {moved_to or named or '(base_model_name_or_path is null)'} is not there"
            hint = "say where it is with --base FOLDER"
            if named and not moved_to and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", named):
                hint += f"; if it is on the hub: `{command_line('download', named)}`"
            raise ModelError(what, where=self.folder / ADAPTER, hint=hint)
        refuse_other(folder)
        _, weights, names = checked_files(folder)
        try:
            self.learned = learned(self.keys, read_tensors(self.folder), names, weights)
        except ValueError as error:
            raise ModelError(str(error), where=self.folder) from None
        return folder

    def method(self, changes: Mapping[str, Any] | None = None) -> Method:
        if changes:
            raise ConfigError("an adapter of peft has no keys that may change", where="method")
        return self.learned[0]

    def delta(self) -> dict[str, Tensor]:
        return self.learned[1]

    def tokenizer_and_template(self, folder: Path) -> tuple[Tokenizer, ChatTemplate]:
        """Returns those that lie beside the adapter, as trainers save them, or else the base's."""
        tokenizer = Tokenizer.load(self.texts(folder))
        return tokenizer, ChatTemplate(tokenizer, is_setting=False)

    def texts(self, base: Path) -> Path:
        own = any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        return self.folder if own else base


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, in float32 or better."""
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise ModelError(f"there is no {FILES[0]} beside {ADAPTER}", where=folder)
    if path.suffix == ".safetensors":
        read_header(path)
        tensors = load_file(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ModelError(f"no whole file of tensors: {' '.join(str(error).split())[:200]}", where=path) from None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            raise ModelError(f"{name} is no tensor of real numbers", where=path)
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds numbers that are not finite", where=path)
    return {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}


def learned(
    keys: Keys, tensors: dict[str, Tensor], names: NameMap, weights: Weights
) -> tuple[Method, dict[str, Tensor]]:
    """Returns an adapter as a method with its delta; raises a ValueError if that is not possible."""
    if isinstance(keys, PromptKeys):
        return before_text(keys, tensors, names)
    left = {name.removeprefix(WRAPPED).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    if len(left) != len(tensors) or any(not name.startswith(WRAPPED) for name in tensors):
        raise ValueError(f"names of tensors must begin with {WRAPPED}, each its own")
    place = Places(names)
    modules = place.targeted(keys)
    lora = isinstance(keys, LoraKeys)
    leaves = LEAVES[keys.use_dora] if lora else {"ia3_l": "g"}
    own: dict[str, dict[str, Tensor]] = {}  # by linear layer of ours
    ranks: dict[str, int] = {}
    missing = []
    for module in modules:
        found = {}
        for theirs in leaves:
            found[theirs] = left.pop(f"{module}.{theirs}.weight", None)
            found[theirs] = left.pop(f"{module}.{theirs}", None) if found[theirs] is None else found[theirs]
            missing += [f"{module}.{theirs}"] if found[theirs] is None else []
        if missing:
            continue
        parts, outputs, inputs = place.shape(module)
        if lora:
            rank = keys.rank(module)
            check_shape(f"{module}.lora_A", found["lora_A"], (rank, inputs))
            check_shape(f"{module}.lora_B", found["lora_B"], (outputs, rank))
            found["lora_B"] = found["lora_B"] * (keys.scale(module) * rank / keys.r)  # ours is alpha / rank
            ranks |= dict.fromkeys(parts, rank)
        else:
            found["ia3_l"] = found["ia3_l"].flatten()
        for theirs, ours in leaves.items():
            rows = dict.fromkeys(parts, found[theirs])
            if theirs != "lora_A":
                check_shape(f"{module}.{theirs}", found[theirs], (outputs, *found[theirs].shape[1:]))
                rows = place.rows(module, found[theirs])
            for part, tensor in rows.items():
                own.setdefault(part, {})[ours] = tensor
    if missing:
        raise ValueError(f"target_modules asks for {some(missing)}, which the file does not hold")
    trained = base_parameters(keys, left, names, place, weights)
    if lora:
        cls = DoRA if keys.use_dora else LoRA
        method = cls(rank=keys.r, alpha=float(keys.r), targets=tuple(own), ranks=ranks, unfreeze=tuple(trained))
    else:
        method = IA3(targets=tuple(own), unfreeze=tuple(trained))
    with torch.device("meta"):
        attach(model := GPT(names.config), method)
    delta = dict(trained)
    for layer, parts in own.items():
        (name,) = model.get_submodule(layer).slot.deltas
        delta |= {f"{layer}.slot.{name}.{leaf}": tensor for leaf, tensor in parts.items()}
    return method, delta


LEAVES = {
    False: {"lora_A": "A", "lora_B": "B"},
    True: {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"},
}


class Places:
    """The modules of transformers' class, and the parameters of ours that each holds."""

    def __init__(self, names: NameMap):
        self.names = names
        self.of: dict[str, list[str]] = {}
        for parts in names.parts.values():
            first, _, leaf = parts[0].rpartition(".")
            if leaf == "weight":
                self.of[names.module(first)] = [part.removesuffix(".weight") for part in parts]
        with torch.device("meta"):
            model = GPT(names.config)
        self.linear = {names.module(name) for name, m in model.named_modules() if isinstance(m, Linear)}
        self.embed, self.head = names.module("embed"), names.module("head")

    def shape(self, module: str) -> tuple[list[str], int, int]:
        """Returns our layers in a module, and how many outputs and inputs it has."""
        parts = self.of[module]
        shapes = [self.names.ours[f"{part}.weight"] for part in parts]
        return parts, sum(shape[0] for shape in shapes), shapes[0][1]

    def rows(self, module: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the rows of each of our layers, of a tensor with a row for each output of a module."""
        theirs = self.names.file_name(f"{self.of[module][0]}.weight")
        return {part.removesuffix(".weight"): rows for part, rows in self.names.rows(theirs, tensor).items()}

    def targeted(self, keys: Layers) -> list[str]:
        """Returns the linear layers that an adapter has, as peft finds them."""
        everywhere = [*self.of, *({self.head} - self.of.keys())]
        hits = [module for module in everywhere if self.is_target(module, keys)]
        if not hits:
            raise ValueError(f"target_modules {keys.target_modules!r} names no module of the base")
        for module in hits:
            if module not in self.linear:
                raise ValueError(f"target_modules names {module}, which is no linear layer: that is not supported")
            if module not in self.of:
                what = f"target_modules names {module}, which is the embedding of this base (tie_word_embeddings)"
                raise ValueError(f"{what}: an update of the head alone would untie them")
        return hits

    def is_target(self, module: str, keys: Layers) -> bool:
        if fits(module, keys.exclude_modules or ()):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in keys.modules_to_save or ()):
            return False
        if isinstance(keys.target_modules, str):
            if keys.target_modules.lower() == "all-linear":
                return module in self.linear and module != self.head
            return re.fullmatch(keys.target_modules, module) is not None
        if module in keys.target_modules:
            return True
        wanted = getattr(keys, "layers_to_transform", None)
        if not fits(module, keys.target_modules) or wanted is None or wanted == ():
            return fits(module, keys.target_modules)
        patterns = keys.layers_pattern or (r"[^.]*",)
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
        number = next((int(match[1]) for match in found if match), None)
        return number in ((wanted,) if isinstance(wanted, int) else wanted)


def fits(module: str, targets: tuple[str, ...] | str) -> bool:
    """Returns whether a regular expression is a module's name, or one of several names its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; by its config and base it must be {shape}")


def base_parameters(
    keys: Layers, left: dict[str, Tensor], names: NameMap, place: Places, weights: Weights
) -> dict[str, Tensor]:
    """Returns the base's parameters that an adapter replaces, under our names; `left` are its tensors but updates."""
    for saved in keys.modules_to_save or ():
        absent = [m for m in place.of if m.endswith(saved) and f"{m}.weight" not in left]
        if absent or not any(m.endswith(saved) for m in (*place.of, place.head)):
            raise ValueError(
                f"modules_to_save names {saved}, which {'the file' if absent else 'the base'} does not hold"
            )
    embed, head = f"{place.embed}.weight", f"{place.head}.weight"
    if names.config.tie_embeddings and (embed in left or head in left):
        same = embed in left and head in left and torch.equal(left[embed], left[head])
        if not same and not (embed in left and getattr(keys, "ensure_weight_tying", False)):
            what = "modules_to_save names the embedding or the head, which are one in this base (tie_word_embeddings)"
            raise ValueError(f"{what}, and the file does not hold the same for both")
        left.pop(head, None)
    files = {module: file for file, module in names.modules.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in left.items():
        module, _, leaf = name.rpartition(".")
        theirs = f"{files.get(module, module)}.{leaf}"
        if theirs not in names.parts:
            raise ValueError(f"the tensor {name} is of no module that the config and the base have")
        check_shape(name, tensor, names.shapes[theirs])
        tensor = tensor.t() if names.transposed(theirs) and tensor.ndim == 2 else tensor
        found |= names.rows(theirs, tensor)
    return {
        ours: t.contiguous() for ours, t in found.items() if not torch.equal(t, names.read(weights, ours).to(t.dtype))
    }


def before_text(keys: PromptKeys, tensors: dict[str, Tensor], names: NameMap) -> tuple[Method, dict[str, Tensor]]:
    """Returns vectors, or keys and values, that stand before the text."""
    config, count = names.config, keys.num_virtual_tokens
    if [*tensors] != ["prompt_embeddings"] or count < 1:
        raise ValueError("there must be num_virtual_tokens and one tensor, prompt_embeddings")
    if keys.num_transformer_submodules not in (None, 1):
        raise ValueError(f"num_transformer_submodules must be 1, got {keys.num_transformer_submodules}")
    (vectors,) = tensors.values()
    if keys.peft_type != "PREFIX_TUNING":
        check_shape("prompt_embeddings", vectors, (count, config.d_model))
        method, places = Prompt(prompt_length=count, init="random"), ["after_embed"]
    else:
        check_shape("prompt_embeddings", vectors, (count, 2 * config.n_layers * config.n_kv_heads * config.head_dim))
        method = Prefix(prompt_length=count)
        places = [f"blocks.{layer}.attn.{leaf}.slot" for layer in range(config.n_layers) for leaf in "kv"]
    with torch.device("meta"):
        attach(model := GPT(config), method)
    delta = {}
    for place, part in zip(places, vectors.chunk(len(places), 1), strict=True):
        (name,) = model.get_submodule(place).deltas
        delta[f"{place}.{name}.vectors"] = part.contiguous()
    return method, delta
