"""Reads a Hugging Face folder of pickled weights without running the code that a pickle may hold."""

import os
import pickle
import re
import struct
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from litpeft.core.errors import ModelError, counted, some
from litpeft.core.json import read_shards
from litpeft.core.safetensors import DTYPES, check_room, copy_companions, is_finite, write_safetensors
from litpeft.exchange.run import write_config
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import left_out, read_config

ONE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class BinFolder:
    """A folder with config.json and pytorch_model.bin, or its shards and their index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.family, self.config = read_config(folder)
        self.shards = self._shards()
        for path in (folder / file for file in self.shards):
            if not is_zipfile(path):
                what = "is cut short, or was written by torch before 1.6" if path.stat().st_size else "is empty"
                raise ModelError(what, where=path, hint="download it again, or save it with a newer torch")
        size, layers = sum((folder / file).stat().st_size for file in self.shards), self.config.n_layers
        if layers * self.config.d_model > size:  # an absurd config.json must not cost memory
            what = f"config.json{left_out(folder)} says {layers} layers of width {self.config.d_model}"
            raise ModelError(f"{what}, the weights ({some(list(self.shards))}) have {size} bytes", where=folder)

    def summary(self) -> str:
        files = f"{len(self.shards)} shards" if len(self.shards) > 1 else next(iter(self.shards))
        return f"{self.family}, {counted(self.config.n_layers, 'layer')}, {files}"

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the weights as safetensors and copies the model's other files."""
        copy_companions(self.folder, folder)
        if dtype is not None:
            write_config(folder, dtype)
            check_room(folder, NameMap(self.family, self.config).shapes.values(), dtype)
        write_safetensors(folder, self.tensors(dtype))

    def tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor once, shard by shard, without buffers and without a head that is the embedding."""
        names = NameMap(self.family, self.config)
        ends = {names.file_name(f"{end}.weight"): end for end in ("embed", "head")}
        for usual, other in names.other_prefixes.items():
            ends |= {other + name.removeprefix(usual): end for name, end in ends.items() if name.startswith(usual)}
        tied: dict[str, tuple[str, str]] = {}  # file and name: a tensor would keep its whole file in memory
        for file, listed in self.shards.items():
            state = read_bin(self.folder / file)
            if listed is not None and listed != state.keys():
                odd = ", ".join(sorted(listed ^ state.keys())[:5])
                raise ModelError(f"the index and the file disagree on {odd}", where=self.folder / file)
            seen: set[int] = set()
            for name, tensor in state.items():
                end = ends.get(name) if self.config.tie_embeddings else None
                if end is not None:
                    tied[end] = file, name
                if end == "head" or any(fnmatchcase(name, glob) for glob in names.buffers):
                    continue
                check_numbers(name, tensor, self.folder / file)
                shared = tensor.data_ptr() in seen  # safetensors takes no two tensors of one memory
                seen.add(tensor.data_ptr())
                tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
                yield name, tensor.clone() if shared else tensor
            del state, tensor  # and with them the file's pages, before the next is read
        if len(tied) == 2 and not torch.equal(*(read_bin(self.folder / file)[name] for file, name in tied.values())):
            embed, head = (names.file_name(f"{end}.weight") for end in ("embed", "head"))
            what = f"config.json says that {head} is {embed}, but they differ"
            raise ModelError(what, where=self.folder, hint='set "tie_word_embeddings": false')

    def _shards(self) -> dict[str, set[str] | None]:
        """Returns file -> names of its tensors, or None if there is no index."""
        path = self.folder / INDEX
        if not path.exists():
            if (self.folder / ONE).exists():
                return {ONE: None}
            raise ModelError(f"has shards, but their index {INDEX} is missing", where=self.folder)
        shards: dict[str, set[str] | None] = {}
        for name, file in read_shards(path, ".bin").items():
            shards.setdefault(file, set()).add(name)
        missing = sorted(file for file in shards if not os.path.isfile(self.folder / file))
        if missing:
            raise ModelError(f"{', '.join(missing[:5])} not in the folder", where=path)
        return shards


def read_bin(path: Path) -> dict[str, Tensor]:
    """Returns the named tensors of a file, memory-mapped; anything but plain tensors is refused."""
    hint = "only a dict of plain tensors is read; nothing else in such a file can be trusted"
    check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = f"asks to run {wanted[1]}" if wanted else "is no pickle of plain tensors"
        raise ModelError(f"holds more than weights, and was not loaded: it {why}", where=path, hint=hint) from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        what = f"is damaged: {str(error).strip().splitlines()[0][:200]}"
        raise ModelError(what, where=path, hint="download or copy it again") from None
    if not isinstance(state, dict) or not state:
        raise ModelError(f"holds {type(state).__name__}, not named tensors", where=path, hint=hint)
    for name, tensor in state.items():
        plain = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        # with strides of 0 a small storage can claim to be a huge tensor
        if not plain or tensor.is_quantized or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ModelError(f"{name!r} is not a plain tensor", where=path, hint=hint)
    return state


def check_numbers(name: str, tensor: Tensor, path: Path) -> None:
    """Raises unless a tensor has a floating-point dtype of safetensors files and finite values."""
    if tensor.dtype not in DTYPES.values():
        expected = ", ".join(str(dtype) for dtype in DTYPES.values())
        what = f"{name} holds {tensor.dtype}, expected {expected}".replace("torch.", "")
        raise ModelError(what, where=path, hint="quantised weights are not read: take the model's plain weights")
    if tensor.numel() and not is_finite(tensor):
        hint = "the file is damaged, or was saved by a run that had failed"
        raise ModelError(f"{name} holds numbers that are not finite", where=path, hint=hint)


def check_sums(path: Path) -> None:
    """Raises unless every record of an archive is uncompressed and has the right checksum."""
    try:
        with ZipFile(path) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != ZIP_STORED]
            wrong = packed[0] if packed else archive.testzip()
    except (BadZipFile, OSError, EOFError, ValueError, LookupError, RuntimeError, struct.error) as error:
        wrong = str(error)
    if wrong:
        raise ModelError(f"is damaged at {wrong}", where=path, hint="download or copy it again")
