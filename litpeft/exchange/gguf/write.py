"""Writes a model as a GGUF file, tensor by tensor: only one is in memory at a time."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.place import FREE_SPACE, check_disk, disk_fault
from litpeft.core.safetensors import is_finite
from litpeft.exchange.gguf.encoding import decode, encode, row_bytes
from litpeft.exchange.gguf.latent import joined, split, split_names
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.gguf.rope import scaling_keys
from litpeft.model.affine import Affine
from litpeft.model.quantize.bits import unpack_bits
from litpeft.model.quantize.grouped import GROUP, Grouped
from litpeft.model.slots import Linear

FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q4_0: 2, Type.Q8_0: 7, Type.BF16: 32}  # general.file_type
KINDS = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


def header(layout: Layout) -> dict[str, Any]:
    """Returns the sizes and switches of a model as GGUF names them."""
    config, known = layout.config, layout.gguf
    norm = "layer_norm_rms_epsilon" if config.norm.startswith("rms") else "layer_norm_epsilon"
    values = {
        "context_length": config.max_positions, "embedding_length": config.d_model, "block_count": config.n_layers,
        "feed_forward_length": config.d_ff, "vocab_size": config.vocab_size, f"attention.{norm}": config.norm_eps,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    }  # fmt: skip
    if config.rotary_size:
        values |= {"rope.dimension_count": config.rotary_size, "rope.freq_base": config.main_rope.theta}
        values |= scaling_keys(config, known)
    said = {key: known.key(key) for key in known.keys}
    if config.window is not None and "window" not in [field for field, _ in said.values()]:  # it attends to all tokens
        values["context_length"] = min(config.max_positions, config.window)
    found = {key: (getattr(config, field) if field else config, as_) for key, (field, as_) in said.items()}
    values |= {key: as_(value) for key, (value, as_) in found.items() if value is not None and as_(value) is not None}
    return {f"{known.arch}.{key}": value for key, value in values.items()}


def write_gguf(
    path: Path,
    layout: Layout,
    types: dict[str, Type],
    wanted: Type,
    vocabulary: dict[str, Any],
    rows: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes a file whose tensors have these types; `rows` are the bytes (rows, ...) of each of our parameters."""
    writer = gguf.GGUFWriter(path, layout.gguf.arch)
    general = {"type": "model", "file_type": FILE_TYPES[wanted], "quantization_version": gguf.GGML_QUANT_VERSION}
    values = {f"general.{key}": value for key, value in general.items()} | header(layout) | vocabulary
    places: dict[str, list[str]] = {}
    for name, parts in layout.parts.items():
        for part in parts:
            places.setdefault(part, []).append(name)
    shapes = {name: (layout.shape(name), type_) for name, type_ in types.items()}
    divisors = layout.rope_divisors()
    shapes |= {name: (tuple(vector.shape), Type.F32) for name, vector in divisors.items()}
    with _Slots(writer, values, shapes) as slots:
        for name, vector in divisors.items():
            slots.fill(name, vector.view(torch.uint8))
        for ours, own in rows:
            if split_names(ours):
                sizes = [slots.left[name] for name in places[ours]]
                for name, piece in zip(places[ours], own.split(sizes), strict=True):
                    slots.fill(name, piece)
                continue
            for name in places[ours]:
                for at, piece in layout.pieces(name, ours, layout.stored(ours, own)):
                    slots.fill(name, piece, at * own[0].numel())


class _Slots:
    """A file whose header is written, with places for the tensors, which come in any order."""

    def __init__(
        self, writer: gguf.GGUFWriter, values: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], Type]]
    ):
        for key, value in values.items():
            writer.add_key_value(key, value, gguf.GGUFValueType[KINDS[type(value)]])
        self.starts, self.left, end = {}, {}, 0
        for name, (shape, type_) in shapes.items():
            size = shape[0] * row_bytes(shape, type_)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=type_)  # raw_dtype is what counts
            self.starts[name], self.left[name] = end, size
            end += -(-size // writer.data_alignment) * writer.data_alignment
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            [self.file] = writer.fout
            start = -(-self.file.tell() // writer.data_alignment) * writer.data_alignment
            check_disk(writer.path.parent, start + end, "the weights", FREE_SPACE)
            self.file.truncate(start + end)
        except OSError as error:
            raise disk_fault(error, writer.path.parent) or error from None
        self.start, self.writer = start, writer

    def __enter__(self) -> "_Slots":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.writer.close()
        missing = [name for name, left in self.left.items() if left]
        if missing and kind is None:
            raise ModelError(f"the file would not be a whole model: {missing[0]} is missing", where=self.writer.path)

    def fill(self, name: str, rows: Tensor, at: int = 0) -> None:
        """Writes bytes of a tensor from its byte `at` on."""
        data = rows.contiguous().view(-1).numpy()
        try:
            self.file.seek(self.start + self.starts[name] + at)
            self.file.write(data)  # unlike data.tofile, its error has a number
        except OSError as error:
            raise disk_fault(error, self.writer.path.parent) or error from None
        self.left[name] -= data.nbytes


class Encoder:
    """Turns our parameters into bytes of the types that they have in the file.

    Those of one that lies in two tensors follow each other.
    """

    def __init__(self, layout: Layout, types: dict[str, Type], where: str):
        self.layout, self.where = layout, where
        self.types = {part: type_ for name, type_ in types.items() for part in layout.parts[name]} | types
        self.names = {part: name for name in types for part in layout.parts[name]}

    def __call__(self, ours: str, values: Tensor) -> Tensor:
        """Returns the bytes (rows, ...) of a parameter; raises if a number does not fit its type."""
        if names := split_names(ours):
            pieces = zip(names, split(self.layout.config, values), strict=True)
            return torch.cat([self._encoded(ours, name, piece.flatten(0, 1)).flatten() for name, piece in pieces])
        return self._encoded(ours, ours, self.layout.computed(self.names[ours], values))

    def read(self, ours: str, rows: Tensor) -> Tensor:
        """Returns the numbers of such bytes, in float32."""
        if names := split_names(ours):
            shapes = [self.layout.shape(name) for name in names]
            sizes = [shape[0] * row_bytes(shape, self.types[name]) for name, shape in zip(names, shapes, strict=True)]
            pieces = zip(names, shapes, rows.split(sizes), strict=True)
            return joined(*(decode(own.view(math.prod(shape[:2]), -1), self.types[name], shape)
                            for name, shape, own in pieces))  # fmt: skip
        values = decode(rows, self.types[ours], self.layout.names.ours[ours])
        return self.layout.restored(self.names[ours], values)

    def _encoded(self, ours: str, name: str, values: Tensor) -> Tensor:
        """Returns the bytes of a tensor that is or is a part of one of our parameters."""
        rows = encode(values, self.types[name])
        if self.types[name] == Type.F16 and not is_finite(rows.view(torch.float16)):
            what = f"{ours} holds numbers that are too large for float16"
            raise ModelError(what, where=self.where, hint="write bf16 or f32")
        return rows


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


def q4_1(codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns the bytes (out, 20 * groups) of Q4_1, which holds the same numbers as quantize/grouped.py.

    W = d * q + m for 32 inputs of an output, with d and m in float16 and q from 0 to 15; of three and two bits the
    file's four are not all used.
    """
    halves = torch.stack((scale, shift), -1).view(torch.uint8)  # (out, groups, 4)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat((halves, nibbles), -1).flatten(1)
