"""safetensors files: memory-mapped reading, writing tensor by tensor, fingerprints."""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from litpeft.core.checksums import (
    begin_sums,
    has_checksums,
    read_header,
    tensor_sums,
    verify_sums,
    write_checksums,
)
from litpeft.core.errors import ModelError, ResourceError, some
from litpeft.core.folders import COMPANIONS
from litpeft.core.json import read_shards, write_json
from litpeft.core.place import FREE_SPACE, check_disk, disk_fault
from litpeft.core.recognise import convert_hint, refuse_other

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {  # of weights in fewer bits, and what lies beside them
    **{"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
RESULT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # as settings say them
SHARD_BYTES = 5_000_000_000
HEADER_BYTES = (1 << 17) - 8  # reserved for the header of a file that is written, so that tensors begin at a page
MAPPED_BYTES = 1 << 25  # of mapped files that are read before their pages are dropped


class Weights:
    """The tensors of a folder's safetensors files, by name; memory-mapped, so they are read when they are used."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            placed = read_shards(index, ".safetensors")
        elif (folder / "model.safetensors").exists() or (folder / "model.safetensors").is_symlink():
            placed = {}
        else:
            refuse_other(folder)
            shards = sorted(p.name for p in folder.glob("*.safetensors"))
            if shards and all(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in shards):
                what = f"there are shards ({some(shards)}), but their index {index.name} is missing"
                raise ModelError(what, where=folder, hint="download or copy it, too")
            if shards:
                hint = "if that is the model, rename it to model.safetensors" if len(shards) == 1 else ""
                raise ModelError(f"there is no model.safetensors, only {some(shards)}", where=folder, hint=hint)
            other = [*sorted(folder.glob("*.gguf"))[:1], *([folder] if any(folder.glob("pytorch_model*.bin")) else [])]
            hint = convert_hint(other[0]) if other else "see `litpeft download --help`"
            raise ModelError("there is no model.safetensors", where=folder, hint=hint)
        files = sorted(set(placed.values())) or ["model.safetensors"]
        self.headers = {file: read_header(folder / file) for file in files}
        self.file_of: dict[str, str] = {}
        for file, header in self.headers.items():
            for name in header:
                if name in self.file_of:
                    raise ModelError(f"{name} is in {self.file_of[name]} and in {file}", where=folder)
                self.file_of[name] = file
        missing = sorted(name for name, file in placed.items() if self.file_of.get(name) != file)
        if missing:
            raise ModelError(f"{some(missing)} not in the file that the index names", where=index)
        self._maps: dict[str, mmap.mmap] = {}
        self._read_bytes = 0  # of tensors that were used since the pages were dropped

    def __deepcopy__(self, memo: dict) -> "Weights":
        return self  # the same files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[self.file_of[name]][name]["shape"])

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor as safetensors spells it: F32, BF16, ..."""
        return self.headers[self.file_of[name]][name]["dtype"]

    def read(self, name: str) -> Tensor:
        """Returns a tensor. It must not be written to: `drop_pages` would undo that."""
        dtype, shape, file = (DTYPES | CODES)[self.dtype(name)], self.shape(name), self.file_of[name]
        first, _ = self.headers[file][name]["data_offsets"]
        if file not in self._maps:
            with open(self.folder / file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._maps[file], dtype=dtype, count=math.prod(shape), offset=first).view(shape)

    def fingerprint(self) -> str:
        """Returns the sha256 over every tensor's name, dtype, shape and bytes; it does not depend on sharding."""
        digests = self.verified_sums()
        lines = [f"{name} {self.dtype(name)} {list(self.shape(name))} {digests[name]}\n" for name in self.file_of]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def verified_sums(self) -> dict[str, str]:
        """Returns the sha256 of every tensor; raises if they are not those of the folder's checksums.json."""
        self.begin_sums()
        found = [tensor_sums(self.folder / file) for file in self.headers]
        sums = {name: digest for part in found for name, digest in part.items()}
        verify_sums(self.folder, sums, self.file_of)
        return sums

    def verify(self) -> None:
        """Raises if a tensor's sha256 is not that of the folder's checksums.json; without that file says so once."""
        if has_checksums(self.folder):
            self.verified_sums()

    def begin_sums(self) -> None:
        """Begins to compute the `verified_sums`, in threads: those of a large base take seconds."""
        # the files are read, not mapped, to keep no pages in memory
        begin_sums((self.folder / file for file in self.headers), torch.get_num_threads())

    def drop_pages(self, read_bytes: int = MAPPED_BYTES) -> None:
        """Drops the files' pages from this process's memory; they are read again when they are used.

        With `read_bytes`, the size of a tensor that was just used, only after MAPPED_BYTES of such tensors.
        """
        self._read_bytes += read_bytes
        if self._read_bytes < MAPPED_BYTES:
            return
        self._read_bytes = 0
        for pages in self._maps.values():
            pages.madvise(mmap.MADV_DONTNEED)


def is_finite(tensor: Tensor) -> bool:
    """Returns whether every number of a tensor is finite, without a copy: minimum and maximum propagate nan."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


class _Shard:
    """A safetensors file of one dtype, written tensor by tensor; the library's writer needs all tensors at once."""

    def __init__(self, path: Path):
        self.path, self.end, self.header_size = path, 0, 0
        self.entries: dict[str, Any] = {}
        self.sums: dict[str, str] = {}
        self.handle = path.open("wb", buffering=0)  # unbuffered: closing it cannot fail
        self.handle.seek(8 + HEADER_BYTES)

    def has_room(self, tensor: Tensor, shard_bytes: int) -> bool:
        """Returns whether one more tensor fits; the first one always does."""
        return not self.end or (self.end + tensor.nbytes <= shard_bytes and self.header_size < HEADER_BYTES - 4096)

    def add(self, name: str, tensor: Tensor, pool: ThreadPoolExecutor) -> None:
        """Writes one tensor while another thread computes its checksum."""
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype)
        offsets = [self.end, self.end + tensor.nbytes]
        self.entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        self.header_size += len(json.dumps({name: self.entries[name]}))
        self.end += tensor.nbytes
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = pool.submit(hashlib.sha256, data)
        self.write(data)
        self.sums[name] = digest.result().hexdigest()

    def write(self, data: Any) -> None:
        view = memoryview(data)
        try:
            while len(view):  # one call writes at most 2 GiB
                view = view[self.handle.write(view) :]
        except OSError as error:
            raise disk_fault(error, self.path.parent) or error from None

    def finish(self) -> None:
        """Writes the header, padded with spaces up to the first tensor."""
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.entries).encode().ljust(HEADER_BYTES)
        self.handle.seek(0)
        self.write(struct.pack("<Q", len(header)) + header)


def check_room(folder: Path, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Raises if the disk of `folder` has no room for tensors of these shapes."""
    check_disk(folder, dtype.itemsize * sum(map(math.prod, shapes)), "the weights", FREE_SPACE)


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` with an index, and checksums.json.

    A shard holds tensors of one dtype, to keep them aligned. Only one tensor is in memory at a time.
    """
    shards: list[_Shard] = []
    pool = ThreadPoolExecutor(1)
    try:
        newest: dict[torch.dtype, _Shard] = {}
        for name, tensor in tensors:
            shard = newest.get(tensor.dtype)
            if shard is None or not shard.has_room(tensor, shard_bytes):
                shard = newest[tensor.dtype] = _Shard(folder / f"shard-{len(shards)}")
                shards.append(shard)
            shard.add(name, tensor, pool)
        for shard in shards:
            shard.finish()
    finally:
        pool.shutdown()
        for shard in shards:
            shard.handle.close()
    write_checksums(folder, {name: digest for shard in shards for name, digest in shard.sums.items()}, "litpeft")
    if len(shards) == 1:
        os.rename(shards[0].path, folder / "model.safetensors")
        return
    placed = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(shard.path, folder / file)
        placed |= dict.fromkeys(shard.entries, file)
    index = {"metadata": {"total_size": sum(shard.end for shard in shards)}, "weight_map": dict(sorted(placed.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes one safetensors file with the umask's permissions; the library makes it private."""
    ready: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():  # on the CPU, contiguous, and no two in the same memory
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ResourceError(f"cannot be written: {error}", where=path) from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def copy_companions(source: Path, target: Path, names: Sequence[str] = COMPANIONS) -> None:
    """Copies a model's config, tokenizer and template files from one folder to another."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
