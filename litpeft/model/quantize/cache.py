"""A base's packed weights on disk, beside its own files: written once, read by every later run."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from litpeft import __version__
from litpeft.core.checksums import file_sha256, read_header
from litpeft.core.errors import ModelError, UserError
from litpeft.core.folders import atomic_folder
from litpeft.core.json import read_json, write_json
from litpeft.core.safetensors import save_tensors
from litpeft.core.terminal import say

FORMAT = 1
FILES = ("packed.safetensors", "packed.json")


class Cache:
    """The packed weights of one base in one storage: the folder litpeft-KEY in the base's folder.

    `key` names the storage with what else decides its bytes ("nf4-dq"); `fingerprint` is of the base's weights.
    """

    def __init__(self, base: Path, key: str, fingerprint: str):
        self.folder = base / f"litpeft-{key}"
        self.facts = {"format": FORMAT, "key": key, "fingerprint": fingerprint}

    def tensors(self) -> Any | None:
        """Returns the open safetensors file (`get_tensor(name)` reads one); None, and says why, if it is not valid."""
        if not self.folder.exists():
            return None
        reason = self._reason()
        if reason:
            say(f"{self.folder} is not used, and made anew: {reason}")
            return None
        return safe_open(self.folder / FILES[0], framework="pt")

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Writes the packed tensors by their names in the model; the folder appears at once. No copies on a CPU."""
        try:
            if self.folder.exists():  # an earlier cache is removed, and nothing else
                plain = self.folder.is_dir() and not self.folder.is_symlink()
                if not plain or any(file.name not in FILES for file in self.folder.iterdir()):
                    what = f"there is more than {' and '.join(FILES)}, which litpeft did not write: it is not replaced"
                    raise ModelError(what, where=str(self.folder), hint="move it away")
                shutil.rmtree(self.folder)
            with atomic_folder(self.folder) as temporary:
                save_tensors(tensors, temporary / FILES[0])
                facts = {**self.facts, "sha256": file_sha256(temporary / FILES[0]), "litpeft": __version__}
                write_json(temporary / FILES[1], facts)
        except OSError as error:
            what = f"the packed weights cannot be written: {error.strerror or error}"
            hint = "make room there, or train without keeping them"
            raise ModelError(what, where=str(self.folder), hint=hint) from None

    def _reason(self) -> str | None:
        """Returns why the folder cannot be used, or None if it can."""
        try:
            found = read_json(self.folder / FILES[1], "description of packed weights")
            for name, wanted in self.facts.items():
                if found.get(name) != wanted:
                    return f"its {name} is {found.get(name)!r}, not {wanted!r}"
            read_header(self.folder / FILES[0])
            if found.get("sha256") != file_sha256(self.folder / FILES[0]):
                return f"{FILES[0]} is not the file that was written (sha256 mismatch)"
        except UserError as error:  # damaged: nothing is lost, the base still has it
            return error.what
        return None
