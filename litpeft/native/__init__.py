"""Code of our own for the processor: what decode.cpp computes, compiled once for this machine.

It needs a CPU with AVX-512 BF16, and g++. Where either is missing, torch's and bitsandbytes' kernels do the work.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in (".h", ".cpp"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma")
FLAGS = (*FLAGS, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16")))


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class RowsStruct(Structure):
    """`Rows` of decode.cpp."""

    _fields_ = [
        *_pointers("weight", "scale", "codes", "bias", "a", "b"),
        *((name, c_int64) for name in ("kind", "inputs", "outputs", "span", "rank")),
    ]


class BlockStruct(Structure):
    """`Block` of decode.cpp."""

    _fields_ = [
        *((name, RowsStruct) for name in ("qkv", "o", "gate_up", "down")),
        *_pointers("norm1", "norm2"),
        *((name, c_double) for name in ("eps1", "eps2")),
        *((name, c_int64) for name in ("heads", "shared", "size", "turned", "window")),
    ]


class Library:
    """The functions of decode.cpp, on tensors."""

    def __init__(self, file: Path):
        library = ctypes.CDLL(str(file))
        self._product, self._block = library.product, library.block
        self._product.argtypes = [POINTER(RowsStruct), c_void_p, c_void_p, c_int64, c_int64]
        self._block.argtypes = [POINTER(BlockStruct), *[c_void_p] * 7, *[c_int64] * 4]
        self._product.restype = self._block.restype = None

    def product(self, rows: RowsStruct, x: Tensor) -> Tensor:
        """Returns W x + b + update for x (..., in) in bfloat16: (..., out)."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], rows.outputs))
        count = x.numel() // rows.inputs
        self._product(rows, x.data_ptr(), y.data_ptr(), count, torch.get_num_threads())
        return y

    def block(
        self, block: BlockStruct, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Returns what a block makes of x (B, T, d), all contiguous, in bfloat16, the positions (B, T) in int64.

        cos and sin are those of ops.rotate, (B, 1, T, R); keys and values (B, G, room, D) are completed in place.
        """
        y, (rows, tokens, _) = torch.empty_like(x), x.shape
        tensors = (t.data_ptr() for t in (x, y, k, v, positions, cos, sin))
        self._block(block, *tensors, rows, tokens, k.size(2), torch.get_num_threads())
        return y


@cache
def library() -> Library | None:
    """Returns the compiled functions, or None where there cannot be any; compiles at the first call on a machine."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not torch.cpu._is_avx512_bf16_supported() or compiler is None:
        return None
    parts = [" ".join((compiler, *FLAGS)).encode(), *(file.read_bytes() for file in SOURCES)]
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litpeft" / f"native-{key}.so"
    try:
        if not file.exists():
            _compile(compiler, file)
        return Library(file)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in detail.splitlines() if "error" in line), detail).strip()[:200]
        print(f"litpeft is slower than it could be: its own code does not compile here: {reason}", file=sys.stderr)
        return None


def _compile(compiler: str, file: Path) -> None:
    """Writes the shared library; several processes may do so at once."""
    print("compiling what makes litpeft faster on this processor, once", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [compiler, *FLAGS, *(str(file) for file in SOURCES if file.suffix == ".cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(made, file)
