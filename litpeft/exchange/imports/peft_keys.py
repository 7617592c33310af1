"""The keys of peft's adapter_config.json.

Each is honoured, or without effect on what a finished adapter computes (IDLE), or must be off: null, false or empty.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from litpeft.core.errors import ModelError
from litpeft.core.json import read_json
from litpeft.core.recognise import ADAPTER, FOLD
from litpeft.core.typed import later, typed
from litpeft.methods.lora import LARGEST_ALPHA, LARGEST_RANK

IDLE = {  # how it was trained, and what peft puts right itself
    *("auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "init_ia3_weights"),
    *("lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("encoder_hidden_size", "encoder_dropout", "encoder_num_layers", "prefix_projection"),
    *("encoder_reparameterization_type", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    *("tokenizer_name_or_path", "num_attention_heads", "num_layers", "token_dim", "d_initial"),
    *("vera_dropout", "projection_prng_key", "init_weights"),
}
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of A and B, which leave the base's weights alone
Names = tuple[str, ...] | str | None  # ends of modules' names, or a regular expression of whole names


@dataclass
class Keys:
    """What every kind of adapter has in its config."""

    peft_type: str
    base_model_name_or_path: str | None = later(None)
    revision: str | None = later(None)
    task_type: Literal["CAUSAL_LM"] | None = later(None)


@dataclass
class PromptKeys(Keys):
    """Of vectors, or keys and values, before the text."""

    num_virtual_tokens: int = later(0)
    num_transformer_submodules: int | None = later(None)

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}")
        if self.num_transformer_submodules not in (None, 1):
            raise ValueError(f"num_transformer_submodules must be 1, got {self.num_transformer_submodules}")


@dataclass
class LayerKeys(Keys):
    """Of a kind that acts on modules."""

    target_modules: Names = later(None)
    exclude_modules: Names = later(None)
    modules_to_save: tuple[str, ...] | None = later(None)

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("target_modules must be a list of names or a regular expression, got none")
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            check_patterns(key, getattr(self, key) or ())

    def is_target(self, module: str, inner_linear: bool) -> bool:
        """Returns whether a module has an update; `inner_linear` says that it is a linear layer and not the head."""
        if fits(module, self.exclude_modules or ()):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ()):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return inner_linear
        return fits(module, self.target_modules)


@dataclass
class NormKeys(LayerKeys):
    """Of modules that are replaced whole."""


@dataclass
class Ia3Keys(LayerKeys):
    """Of factors of outputs; of feedforward_modules, those of inputs."""

    feedforward_modules: Names = later(None)


@dataclass
class RankKeys(LayerKeys):
    """Of low-rank updates."""

    r: int = later(8)
    layers_to_transform: tuple[int, ...] | int | None = later(None)
    layers_pattern: tuple[str, ...] | str | None = later(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("layers_pattern", self.layers_pattern or ())
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is for a list of target_modules, which is a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is used only with layers_to_transform, which is null")
        if not 1 <= self.r <= LARGEST_RANK:
            raise ValueError(f"r must be at least 1 and at most {LARGEST_RANK}, got {self.r}")

    def is_target(self, module: str, inner_linear: bool) -> bool:
        wanted = self.layers_to_transform
        wanted = (wanted,) if isinstance(wanted, int) else wanted
        if not super().is_target(module, inner_linear) or not wanted or module in self.target_modules:
            return super().is_target(module, inner_linear)
        patterns = self.layers_pattern or (r"[^.]*",)
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", module) for pattern in patterns)
        return next((int(match[1]) for match in found if match), None) in wanted


@dataclass
class VeraKeys(RankKeys):
    """Of matrices that all layers share."""

    bias: Literal["none", "all", "vera_only"] = later("none")
    save_projection: bool = later(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            what = (
                "save_projection must be true: the matrices that peft draws without it differ from machine to machine"
            )
            raise ValueError(what)


@dataclass
class LoraKeys(RankKeys):
    """Of matrices of each layer's own."""

    lora_alpha: float = later(8.0)
    rank_pattern: dict[str, int] | None = later(None)
    alpha_pattern: dict[str, float] | None = later(None)
    use_rslora: bool = later(False)
    use_dora: bool = later(False)
    bias: Literal["none", "all", "lora_only"] = later("none")
    init_lora_weights: bool | str | None = later(True)
    ensure_weight_tying: bool = later(False)
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = later(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in (self.rank_pattern or {}).items():
            if not 1 <= rank <= LARGEST_RANK:
                what = f'rank_pattern["{name[:60]}"] must be at least 1 and at most {LARGEST_RANK}, got {rank}'
                raise ValueError(what)
        for key in ("rank_pattern", "alpha_pattern"):
            check_patterns(key, getattr(self, key) or ())
        if self.init_lora_weights not in PLAIN_STARTS:
            what = (
                f"init_lora_weights {self.init_lora_weights!r} changes the base's weights when peft loads the adapter"
            )
            raise ValueError(f"{what}; save it in peft with path_initial_model_for_weight_conversion")

    def rank(self, module: str) -> int:
        return by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Returns what B A x of a module is multiplied by."""
        return self.over_rank(by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module))

    def over_rank(self, alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def alpha(self) -> float:
        """Returns lora_alpha, or another number where a method of ours cannot have it."""
        return self.lora_alpha if 0 < self.lora_alpha < LARGEST_ALPHA else float(self.r)


KINDS = {
    "LORA": LoraKeys,
    "VERA": VeraKeys,
    "IA3": Ia3Keys,
    "LN_TUNING": NormKeys,
    "PREFIX_TUNING": PromptKeys,
    "PROMPT_TUNING": PromptKeys,
    "P_TUNING": PromptKeys,
}


def read_keys(folder: Path) -> Keys:
    """Returns the config of an adapter; an error names the key that is not honoured."""
    path = folder / ADAPTER
    given = read_json(path, f"{ADAPTER} of peft")
    kind = given.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
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


def fits(module: str, names: tuple[str, ...] | str) -> bool:
    """Returns whether a regular expression is a module's name, or one of several names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that is the end of a module's name."""
    hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(hits, default)


def check_patterns(key: str, patterns: Any) -> None:
    """Raises a ValueError if one of the regular expressions is none."""
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key} {pattern[:60]!r} is no regular expression: {error}") from None
