"""What a model is, read from the config.json of a Hugging Face folder. No table of sizes, no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litpeft.errors import UserError

# What belongs to a model beside its weights; copied from folder to folder as it is.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


# What config.json calls an activation -> what model.py does.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to reach beyond the length that the model was trained on."""

    kind: str  # linear | llama3
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder-only model; every field changes what model.py builds."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    norm: str = "rms"  # rms | layer, which has a bias
    norm_eps: float = 1e-5
    rotary_dim: int | None = None  # so many first dimensions of a head turn with the position; None = all, 0 = none
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    learned_positions: bool = False  # a table of max_positions vectors, one added to each token's embedding
    tie_embeddings: bool = False
    activation: str = "silu"  # silu | relu | gelu | gelu_tanh
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    parallel_residual: bool = False  # the MLP sees what the attention of its block saw, not what it gave
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # a token sees this many tokens back, itself included; None = all

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        factor = self.rope_scaling.factor if self.rope_scaling else 1.0
        for name, value in {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta, "rope factor": factor}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"sliding_window must be null or at least 1, got {self.window!r}")
        if self.norm not in ("rms", "layer") or self.activation not in ACTIVATIONS.values():
            raise ValueError(f"norm {self.norm!r} with activation {self.activation!r}: model.py does not have both")
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, got {self.tie_embeddings!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.turned % 2 or not 0 <= self.turned <= self.head_dim:
            what = f"the rotary part of a head must be even and at most head_dim ({self.head_dim})"
            raise ValueError(f"{what}, got {self.turned}")

    @property
    def turned(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Returns the JSON object in `path`; `what` names the file's role in the error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "a model folder holds config.json, *.safetensors and tokenizer files; see `litpeft download --help`"
        raise UserError("MODEL-001", f"there is no {what}", where=str(path), hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("MODEL-002", f"{what} cannot be read: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("MODEL-003", f"{what} must be a JSON object, got {type(value).__name__}", where=str(path))
    return value


def read_config(folder: Path) -> tuple[str, ModelConfig]:
    """Returns the family's name (`llama`, ...) and the ModelConfig of a Hugging Face folder."""
    from litpeft.families import FAMILIES, family

    path = folder / "config.json"
    hf = read_json(path, "config.json of a model")
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            "MODEL-004", f"model_type {name!r} is not supported; litpeft has {', '.join(FAMILIES)}", where=str(path)
        )
    if "quantization_config" in hf:
        raise UserError(
            "MODEL-005", "the weights are already quantised; take the model's plain weights", where=str(path)
        )
    try:
        return name, family(name).config(hf)
    except KeyError as error:
        raise UserError("MODEL-006", f"the key {error} is missing", where=str(path)) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError("MODEL-007", str(error), where=str(path)) from None


def activation(hf: dict[str, Any], key: str, default: str) -> str:
    """Returns what model.py calls the activation that config.json names under `key`."""
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} {name!r} is not supported; litpeft has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope_settings(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and the scaling; `rope_parameters` is of transformers 5, older files differ."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling("llama3", float(rope["factor"]), low, high, int(original))
    raise ValueError(f"rope scaling {kind!r} is not supported; litpeft has default, linear and llama3")
