"""What the families with layers of Mamba-2 have in common: keys of config.json, and names of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ConfigKeys
from litpeft.model.families import Place
from litpeft.model.families.deepseek_v3 import refuse_null
from litpeft.model.parts import StateSpace
from litpeft.model.rope import FULL

MAMBA = ("mamba", "linear_attention")  # names of a layer in layer_types
ATTENTION = ("attention", FULL)


def mamba_names(theirs: str, ours: str = "blocks.{}.attn") -> dict[str, str | Place]:
    """Returns the name map of a layer, for its modules in the files and here."""
    fused = Place(f"{theirs}.in_proj")
    return {
        ours: theirs,  # A_log, dt_bias and D
        **{f"{ours}.in_{leaf}": fused for leaf in ("z", "x", "b", "c", "dt")},
        f"{ours}.conv": f"{theirs}.conv1d",
        f"{ours}.norm": f"{theirs}.norm",
        f"{ours}.out": f"{theirs}.out_proj",
    }


@dataclass(frozen=True)
class Mamba2Keys(ConfigKeys):
    """The keys that the classes of Granite 4.0, Bamba and Falcon-H1 have alike."""

    mamba_n_heads: int | None = 128
    mamba_n_groups: int | None = 1
    mamba_d_state: int | None = 256
    mamba_d_head: int | str | None = "auto"
    mamba_d_conv: int | None = 4
    mamba_expand: int | None = 2
    mamba_conv_bias: bool | None = True
    mamba_proj_bias: bool | None = False


@dataclass(frozen=True)
class LlamaAndMamba2Keys(Mamba2Keys):
    """Those that the classes of Bamba and Falcon-H1 have alike besides."""

    vocab_size: int = 128000
    tie_word_embeddings: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False

    ALIASES = {"layer_types": "layers_block_type"}


def state_space(keys: Any, hf: Mapping[str, Any], inner: int | None = None, **own: Any) -> StateSpace:
    """Returns the sizes of a layer whose x is `inner` wide, if not as wide as mamba_expand says.

    What is `own` is set beside them or in their place.
    """
    names = ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "conv_bias", "proj_bias")
    refuse_null(keys, *(f"mamba_{name}" for name in names))
    heads, size, inner = keys.mamba_n_heads, keys.mamba_d_head, inner or keys.mamba_expand * keys.hidden_size
    if isinstance(size, str) and size != "auto":
        raise ValueError(f'mamba_d_head "{size[:40]}" is not supported; it must be a whole number or "auto"')
    size = inner // heads if size == "auto" else size
    if heads * size != inner:
        what = f"mamba_n_heads {heads} times mamba_d_head {size} must be {inner}"
        raise ValueError(f"{what}, the width of Mamba's layers (mamba_expand times hidden_size, or mamba_d_ssm)")
    least, most = limits(hf)
    bias = {"in_bias": keys.mamba_proj_bias, "out_bias": keys.mamba_proj_bias, "conv_bias": keys.mamba_conv_bias}
    sizes = keys.mamba_n_groups, keys.mamba_d_state, keys.mamba_d_conv
    return StateSpace(heads, size, *sizes, **({"least": least, "most": most} | bias | own))


def limits(hf: Mapping[str, Any]) -> tuple[float, float | None]:
    """Returns what dt is at least, and at most, of `time_step_limit`; None: any number."""
    given = hf.get("time_step_limit", [0.0, float("inf")])
    if isinstance(given, list):  # transformers writes infinity as {"__float__": "Infinity"}
        given = [float("inf") if value == {"__float__": "Infinity"} else value for value in given]
        numbers = len(given) == 2 and all(type(value) in (int, float) for value in given)
        if numbers and 0 <= given[0] <= given[1] and given[0] != float("inf"):
            return float(given[0]), None if given[1] == float("inf") else float(given[1])
    what = "it must be two numbers from 0 on, the smaller first"
    raise ValueError(f"time_step_limit {str(given)[:80]} is not supported; {what}")
