"""Writes a GGUF file anew with its weight matrices in another type, for llama.cpp to be measured on.

python -m scripts.bench.write_gguf SOURCE.gguf F16|Q8_0|Q4_1 OUT.gguf
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_1": 3}  # general.file_type of llama.cpp
REWRITTEN = ("general.architecture", "general.file_type")  # the writer has these from us


def rewrite(source: Path, kind: str, out: Path) -> None:
    """Writes `out`: every matrix in the type that is asked for, vectors in float32, all else as in `source`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.get_field("general.architecture").contents())
    writer.add_file_type(FILE_TYPES[kind])
    for name, field in reader.fields.items():
        if name not in REWRITTEN and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    wanted = GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
