"""Writes a Llama as a GGUF file. Layers that hold groups of integers keep them, as Q4_1; the rest is in one type.

    Q4_1: W = d * q + m for 32 inputs of an output, with d and m in float16 and q from 0 to 15

which is what quantize/grouped.py holds; of three and two bits the file's four are not all used.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.data.pieces import CONTROL, NORMAL, USER_DEFINED
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.gguf.tokenizer import GPT2, IGNORE_MERGES, SPLITS
from litpeft.model.affine import Affine
from litpeft.model.config import ModelConfig
from litpeft.model.families.names import NameMap
from litpeft.model.quantize.bits import unpack_bits
from litpeft.model.quantize.grouped import GROUP, Grouped
from litpeft.model.slots import Linear

Q4_1 = Type.Q4_1
UNUSED = 5  # type of a token: an embedding that no text becomes
TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def check_gguf(names: NameMap) -> None:
    """Raises unless a model is a Llama that the header describes in full."""
    scaling = names.config.rope_scaling
    if names.family != "llama" or (scaling is not None and scaling.kind != "linear"):
        what = "a GGUF file is written of Llamas only, and without scaled positions or with linear ones"
        raise ConfigError(what, where="to", hint="write safetensors, and convert them with llama.cpp")


def header(config: ModelConfig) -> dict[str, Any]:
    """Returns the sizes and switches of a Llama as GGUF names them."""
    values = {
        "context_length": config.max_positions, "embedding_length": config.d_model, "block_count": config.n_layers,
        "feed_forward_length": config.d_ff, "vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    if config.rope_scaling is not None:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    return {f"llama.{key}": value for key, value in values.items()}


def splits_of(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Returns the patterns that a tokenizer.json splits a text by, an empty one for what is not such a pattern."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    found: list[str] = []
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                found += [GPT2] if regex else []
            case _:
                found.append("")
    return tuple(found)


def vocabulary(tokenizer: Tokenizer, rows: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Returns a byte-level tokenizer as GGUF describes it; `rows` are the embeddings."""
    inner, backend = json.loads(tokenizer.backend.inner.to_str()), tokenizer.backend
    model, splits = inner["model"], splits_of(inner["pre_tokenizer"])
    ignores = bool(model.get("ignore_merges"))
    pre = next((name for name, known in SPLITS.items() if known == splits and (name in IGNORE_MERGES) == ignores), None)
    if model["type"] != "BPE" or not model["merges"] or inner["normalizer"] is not None or pre is None:
        what = f"this tokenizer is none that is written to GGUF; those split text as {', '.join(SPLITS)}"
        raise ModelError(what, where=tokenizer.where, hint="write safetensors, and convert them with llama.cpp")
    tokens = [backend.names.get(number, f"[PAD{number}]") for number in range(rows)]

    def kind(number: int, token: str) -> int:
        added = backend.added.get(token)
        return UNUSED if number not in backend.names else NORMAL if added is None else _added(added.special)

    values = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [kind(*pair) for pair in enumerate(tokens)],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "add_bos_token": tokenizer.adds_bos,
    }  # fmt: skip
    eos = tokenizer.token_id(tokenizer.eos)
    named = {"bos": tokenizer.bos_id, "eos": eos, "eot": next((n for n in stop_ids if n != eos), None)}
    named["padding"] = tokenizer.token_id(tokenizer.special_tokens.get("pad_token"))
    values |= {f"{name}_token_id": number for name, number in named.items() if number is not None}
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return found if tokenizer.chat_template is None else found | {"tokenizer.chat_template": tokenizer.chat_template}


def _added(special: bool) -> int:
    return CONTROL if special else USER_DEFINED


def held_in_groups(layer: Linear) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns codes (out, groups, 32), scale and shift in float16 of a layer with its deltas; None if it has no such.

    Deltas that are not constant in each group have to be folded into the weights themselves.
    """
    if not isinstance(layer, Grouped) or layer.in_features % GROUP:
        return None
    packed = layer.folded(layer.slot.frozen(layer) or Affine())
    if packed is None:
        return None
    codes = unpack_bits(packed["weight"], layer.bits).unflatten(1, (-1, GROUP))
    return codes, packed["scale"].half(), packed["shift"].half()


def dequantised(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns the weights (out, in) in float32."""
    return (codes * scale.float()[..., None] + shift.float()[..., None]).flatten(1)


def q4_1(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns the bytes (out, 20 * groups) of Q4_1."""
    halves = torch.stack((scale, shift), -1).view(torch.uint8)  # (out, groups, 4)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat((halves, nibbles), -1).flatten(1)


def write_gguf(
    path: Path,
    names: NameMap,
    tensors: Iterator[tuple[str, Tensor, Type]],
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
) -> None:
    """Writes tensors, by our names, as bytes (rows, ...) or numbers of their types, with header and tokenizer."""
    config = names.config
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    for key, value in (header(config) | vocabulary(tokenizer, config.vocab_size, stop_ids)).items():
        writer.add_key_value(key, value, _kind(value))
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for ours, tensor, type_ in tensors:
        if ours.split(".")[-2] in ("q", "k"):
            tensor = rows_dealt_out(tensor, config.head_dim)
        name = theirs.get_name(names.file_name(ours), (".weight", ".bias"))
        array = tensor.contiguous().view(torch.uint8).numpy() if type_ != Type.F32 else tensor.contiguous().numpy()
        writer.add_tensor(name, array, raw_dtype=type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _kind(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return gguf.GGUFValueType[kinds[type(value)]]


def rows_dealt_out(rows: Tensor, head_dim: int) -> Tensor:
    """Returns q or k (heads * D, ...) with each head's rows a0 a1 … b0 b1 … reordered to a0 b0 a1 b1 …."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
