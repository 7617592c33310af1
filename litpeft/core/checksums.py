"""checksums.json: the sha256 of every tensor of a model folder, as it was downloaded or written.

It detects damage that leaves finite numbers. The sums are of tensors, not of files, since `Weights.fingerprint` needs
the same ones.
"""

import hashlib
import json
import os
import re
import struct
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

from litpeft.core.errors import ModelError, some
from litpeft.core.json import read_json, read_optional, write_json
from litpeft.core.terminal import is_first, tell

CHECKSUMS = "checksums.json"
BLOCK = 1 << 23  # bytes that are read and hashed at a time: threads wait for Python's lock between them


def write_checksums(folder: Path, sums: dict[str, str], origin: str) -> None:
    """Writes the sha256 of each tensor, by its name in the files, and the origin of the weights."""
    write_json(folder / CHECKSUMS, {"of": origin, "tensors": dict(sorted(sums.items()))})


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """Returns the hub's name and the commit of a model that `litpeft download` fetched from there."""
    of = str(read_optional(folder / CHECKSUMS).get("of", ""))
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", of)
    return (found[1], found[2]) if found else None


def has_checksums(folder: Path) -> bool:
    """Returns whether damage of a folder's weights would be noticed; says so once if not."""
    if (folder / CHECKSUMS).is_file():
        return True
    tell_unverified(folder)
    return False


def verify_sums(folder: Path, sums: dict[str, str], file_of: dict[str, str]) -> None:
    """Raises if a tensor does not have its sha256 of checksums.json; without that file says so once."""
    if not has_checksums(folder):
        return
    path = folder / CHECKSUMS
    known = read_json(path, CHECKSUMS).get("tensors")
    hint = f"take the model again; if you changed its weights yourself, delete {path}"
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise ModelError("tensors must map names to their sha256", where=path, hint=hint)
    damaged = sorted(name for name, digest in sums.items() if known.get(name, digest) != digest)
    if damaged:
        what = f"{some(damaged)} changed since the file was downloaded or written (sha256 mismatch with {CHECKSUMS})"
        raise ModelError(what, where=folder / file_of[damaged[0]], hint=hint)
    other = sorted(known.keys() ^ sums.keys())
    if other:
        what = f"the files and {CHECKSUMS} do not hold the same tensors: {some(other)}"
        raise ModelError(what, where=folder, hint=hint)


@cache
def tell_unverified(folder: Path) -> None:
    """Says once that damage of a folder's weights would not be noticed."""
    if is_first():
        told = f"it has no {CHECKSUMS}, as `litpeft download`, `convert` and `merge` write it"
        tell(f"note: {folder} is unverified: {told}")


def tensor_sums(path: Path, threads: int = 1) -> dict[str, str]:
    """Returns the sha256 of each tensor in a safetensors file; cached until the file changes."""
    begin_sums([path], threads)
    return {name: digest.result() for name, digest in _sums(path, _state(path)).items()}


def begin_sums(paths: Iterable[Path], threads: int) -> None:
    """Begins to compute what `tensor_sums` will return for these files, in threads; returns at once."""
    spans: list[tuple[int, Path, int, Future[str]]] = []
    for path in paths:
        header, digests = read_header(path), _sums(path, _state(path))
        for name, digest in digests.items():
            if not digest.running() and not digest.done():
                digest.set_running_or_notify_cancel()
                first, last = header[name]["data_offsets"]
                spans.append((last - first, path, first, digest))
    left = deque(sorted(spans, key=lambda span: -span[0]))  # no thread is left with a large one at the end
    for _ in range(min(threads, len(left))):
        Thread(target=_work, args=(left,), daemon=True).start()  # a run that ends early does not wait for them


def _state(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=1024)
def _sums(path: Path, state: tuple[int, ...]) -> dict[str, Future[str]]:
    """Returns where the sha256 of each tensor in a file will be."""
    return {name: Future() for name in read_header(path)}


def _work(left: deque[tuple[int, Path, int, Future[str]]]) -> None:
    block = memoryview(bytearray(BLOCK))
    with suppress(IndexError):
        while True:
            size, path, first, digest = left.popleft()
            try:
                digest.set_result(file_sha256(path, first, first + size, block))
            except Exception as error:
                digest.set_exception(error)


def file_sha256(path: Path, first: int = 0, last: int | None = None, block: memoryview | None = None) -> str:
    """Returns the sha256 of a file, or of its bytes from `first` up to `last`; they are read into `block`."""
    size = (path.stat().st_size if last is None else last) - first
    digest, block = hashlib.sha256(), memoryview(bytearray(min(size, BLOCK))) if block is None else block
    with open(path, "rb", buffering=0) as handle:
        handle.seek(first)
        while size and (count := handle.readinto(block[:size])):
            digest.update(block[:count])
            size -= count
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Returns a safetensors file's name -> {dtype, shape, data_offsets in the file}; raises if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    size = 0
    try:
        size = path.stat().st_size
        with safe_open(path, framework="np"):  # checks the layout: offsets, sizes, no overlap
            pass
        with open(path, "rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
            start = handle.tell()
    except FileNotFoundError:
        what = f"{path.name} is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise ModelError(what or "the file is missing", where=path, hint="download or copy it, too") from None
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        what = f"not a whole safetensors file ({size} bytes): {error}"
        raise ModelError(what, where=path, hint="delete it, then download or copy it again") from None
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [start + offset for offset in entry["data_offsets"]]
    return header
