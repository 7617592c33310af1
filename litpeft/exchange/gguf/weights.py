"""Reads a GGUF file: the header becomes config.json, the tensors are dequantised and get Hugging Face names."""

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from litpeft.core.errors import ModelError, counted, located
from litpeft.core.json import write_json
from litpeft.core.safetensors import check_room, write_safetensors
from litpeft.exchange.gguf.config import hf_config
from litpeft.exchange.gguf.layout import DIVISORS, LONGROPE, Layout
from litpeft.exchange.gguf.tokenizer import GgufTokenizer
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
AGAIN = "download or copy it again"
CHUNK = 1 << 20  # weights that are dequantised together
MOST_ENTRIES = 1 << 21  # of an array in the header; vocabularies and merges have far fewer


class BoundedReader(gguf.GGUFReader):
    """A GGUFReader for files that may be damaged: it checks every offset and the length of arrays."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._reach(offset + np.dtype(dtype).itemsize * int(count))
        return super()._get(offset, dtype, count, override_order)

    def _reach(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(f"something in it should reach to byte {end}, but it has {len(self.data)}")

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Returns a field's size in bytes, its parts, the indices of those with a value, and the value's types.

        The package makes numpy arrays for each entry of an array, which took half of the time of a conversion.
        """
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length, start = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64), orig_offs + 12
        count = int(length[0])
        if count > MOST_ENTRIES:
            raise ValueError(f"an array of {count} entries")
        if count and kind[0] in self.gguf_scalar_to_np:
            values = [self._get(start, self.gguf_scalar_to_np[kind[0]], count)]
            end = start + values[0].nbytes
        elif count and kind[0] == gguf.GGUFValueType.STRING and self.byte_order == "I":
            values, end = self._strings(start, count)
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
        return end - orig_offs, [kind, length, *values], list(range(2, 2 + len(values))), types

    def _strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        """Returns the bytes of `count` strings, each of which follows its length, and the end of the last one."""
        data, strings = memoryview(self.data), []
        for _ in range(count):
            first = start + 8
            self._reach(first)
            start = first + struct.unpack_from("=Q", data, start)[0]
            self._reach(start)
            strings.append(data[first:start])
        return strings, start


class GgufFile:
    """A GGUF file of a model. Opening it checks everything but the tensors' values."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with np.errstate(over="raise"):
                self.reader = BoundedReader(path)
                self.values = {name: field.contents() for name, field in self.reader.fields.items()}
        except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            raise ModelError(f"not a whole GGUF file: {error}", where=path, hint=AGAIN) from None
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", where=path) from None
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.values, self.stored, self.left_out = without_next(self.values, self.stored)
        with located(path):
            self._check_kind()
            self._check_layout()
            self.config = hf_config(self.values, self.stored)
            self.tokenizer = GgufTokenizer(self.values, self.config["vocab_size"])
        self.config |= self.tokenizer.ids

    def summary(self) -> str:
        types = Counter(tensor.tensor_type.name for tensor in self.reader.tensors)
        count = sum(tensor.n_elements for tensor in self.reader.tensors)
        kinds = ", ".join(f"{number} {name}" for name, number in types.most_common())
        layers = counted(self._size("block_count"), "layer")
        sizes = f"{self.config['model_type']}, {layers}, {count / 1e6:.1f} M parameters"
        more = f"; without the {counted(self.left_out, 'layer')} for further tokens" if self.left_out else ""
        return f"{sizes}; tensors {kinds}; {self.tokenizer.summary()}{more}"

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the model as a Hugging Face folder."""
        dtype = dtype or getattr(torch, self._own_dtype())
        name = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", self.config | {"dtype": name, "torch_dtype": name})
        self.tokenizer.write(folder, self._size("context_length"))
        layout = Layout(NameMap(*read_config(folder)))
        layout.join_queries(self.stored)
        check_room(folder, layout.names.shapes.values(), dtype)
        write_safetensors(folder, self.tensors(layout, dtype))

    def tensors(self, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor under its Hugging Face name, rounded once, from float32."""
        tied = {"output.weight"} if layout.config.tie_embeddings else set()  # a copy of the embedding
        here, asked = self.stored.keys() - {DIVISORS, *LONGROPE} - tied, layout.parts.keys() - tied
        if here != asked:
            gone, odd = sorted(asked - here), sorted(here - asked)
            what = f"{len(gone)} tensors missing ({', '.join(gone[:3])}), {len(odd)} unknown ({', '.join(odd[:3])})"
            raise ModelError(what, where=self.path, hint="the header and the tensors disagree")
        wanted = [name for name in layout.parts if name in asked]
        for name in wanted:
            shape = tuple(int(size) for size in reversed(self.stored[name].shape))
            if as_matrix(shape) != as_matrix(layout.shape(name)):
                raise ModelError(f"{name} is {shape}, expected {layout.shape(name)}", where=self.path)
        read = lambda name: self._values(name, layout, dtype)
        yield from layout.names.written(pair for name in wanted for pair in layout.ours(name, read).items())

    def _values(self, name: str, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Returns the numbers of a tensor, as ours are."""
        tensor, shape = self.stored[name], layout.shape(name)
        values = torch.empty(shape, dtype=dtype)
        rows, data = values.view(-1, shape[-1]), np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
        for at in range(0, len(rows), step := max(1, CHUNK // shape[-1])):
            with np.errstate(all="ignore"):  # `convert` checks that the numbers are finite
                part = gguf.dequantize(data[at : at + step], tensor.tensor_type)
            part = torch.from_numpy(np.require(part, np.float32, ["C", "W"]))
            rows[at : at + step] = layout.restored(name, part)
        return values

    def _size(self, key: str) -> int:
        """Returns a number of the header, whatever config.json calls it."""
        return self.values[f"{self.values['general.architecture']}.{key}"]

    def _own_dtype(self) -> str:
        """Returns the dtype of most weights of matrices; bfloat16 if any are quantised."""
        held: Counter[str] = Counter()
        for tensor in self.reader.tensors:
            if len(tensor.shape) > 1:
                held[PLAIN.get(tensor.tensor_type.name, "quantised")] += tensor.n_elements
        return "bfloat16" if "quantised" in held else held.most_common(1)[0][0]

    def _check_kind(self) -> None:
        """Raises unless this is a complete, little-endian model in types that can be read."""
        kind = self.values.get("general.type", "model")
        if kind != "model":
            raise ModelError(f"holds {kind!r}, not a model")
        if self.values.get("split.count", 0) not in (0, 1):
            hint = "join them first with llama.cpp's `llama-gguf-split --merge`"
            raise ModelError(f"one of {self.values['split.count']} parts", hint=hint)
        if self.reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ModelError("written for a big-endian machine")
        for type_ in {tensor.tensor_type for tensor in self.reader.tensors}:
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
            except NotImplementedError:
                hint = "take another quantisation of the model, such as Q8_0 or Q4_K_M"
                raise ModelError(f"tensors of type {type_.name} cannot be read", hint=hint) from None

    def _check_layout(self) -> None:
        """Raises unless the tensors follow each other up to the end of the file, as the format requires."""
        end, alignment = self.reader.data_offset, int(self.reader.alignment)
        for tensor in self.reader.tensors:
            if tensor.data_offset != end:
                raise ModelError(f"{tensor.name} lies at byte {tensor.data_offset}, expected {end}", hint=AGAIN)
            last = end + tensor.n_bytes
            end = -(-last // alignment) * alignment
        if self.stored and not last <= len(self.reader.data) <= end:
            raise ModelError(f"has {len(self.reader.data)} bytes, but its tensors end at {last}", hint=AGAIN)


def without_next(values: dict[str, Any], stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Returns a header and tensors without the last layers if those predict further tokens, and how many these are.

    No other layer reads them; transformers' classes have none.
    """
    arch = values.get("general.architecture")
    keys = f"{arch}.block_count", f"{arch}.nextn_predict_layers"
    count, extra = (values.get(key, 0) for key in keys)
    if type(count) is not int or type(extra) is not int or not 0 < extra < count <= len(stored):
        return values, stored, 0
    dropped = tuple(f"blk.{number}." for number in range(count - extra, count))
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(dropped)}
    return values | dict(zip(keys, (count - extra, 0), strict=True)), kept, extra


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor, of a vector that of a matrix with one row."""
    return shape if len(shape) > 1 else (1, *shape)
