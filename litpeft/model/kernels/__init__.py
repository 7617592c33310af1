"""Our own kernels, where torch makes more passes over memory than necessary; else torch's and bitsandbytes' are used.

For CPUs with AVX-512 BF16 they are the C++ files beside this one, compiled once on each machine that has g++. For GPUs
they are in triton.py, and few: there torch is fast.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from litpeft.core.terminal import tell
from litpeft.model.kernels.library import Library

SOURCES = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in (".h", ".cpp"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma")
FLAGS = (*FLAGS, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16")))


@cache
def library() -> Library | None:
    """Returns the compiled functions, or None if the machine cannot have them; compiles at the first call on it."""
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
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in detail.splitlines() if "error" in line), detail).strip()[:200]
        tell(f"litpeft is slower than it could be: its own code does not compile here: {reason}")
        return None


def native(*tensors: Tensor) -> Library | None:
    """Returns the library if it takes these tensors: in bfloat16, on the CPU, a multiple of 32 numbers in a row.

    None under torch.compile, and for subclasses of Tensor, which have no memory (fake tensors) or shard it (DTensor).
    """
    if torch.compiler.is_compiling():
        return None
    known = all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == torch.bfloat16 for x in tensors)
    return library() if known and all(x.size(-1) % 32 == 0 and x.stride(-1) == 1 for x in tensors) else None


@cache
def gpu_kernels() -> ModuleType | None:
    """Returns triton.py, or None without Triton (torch's builds for GPUs include it) or the C compiler it needs."""
    try:
        from litpeft.model.kernels import triton as kernels
    except ImportError:
        return None
    return kernels if shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang") else None


def fused(*tensors: Tensor) -> Library | ModuleType | None:
    """Returns the kernels swiglu, swiglu_backward, rotate and cross_entropy: triton.py's on a GPU, else `native`'s."""
    if torch.compiler.is_compiling():
        return None
    half, types = (torch.bfloat16, torch.float16), (Tensor, torch.nn.Parameter)
    known = all(x.is_cuda and type(x) in types and x.dtype in half and x.stride(-1) == 1 for x in tensors)
    return gpu_kernels() if known else native(*tensors)


def _compile(compiler: str, file: Path) -> None:
    """Writes the shared library; several processes may do so at once."""
    tell("compiling what makes litpeft faster on this processor, once")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        command = [compiler, *FLAGS, *(str(file) for file in SOURCES if file.suffix == ".cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(made, file)
