"""What a run leaves behind and how it is read again: a delta or a model, and delta.json, which says what it is."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft import __version__
from litpeft.checkpoint import Weights, copy_companions, file_sha256, read_header, save_tensors, write_safetensors
from litpeft.config import read_config, read_json
from litpeft.distributed import whole
from litpeft.errors import UserError
from litpeft.families.names import NameMap
from litpeft.folders import atomic_folder
from litpeft.methods import METHODS, method_class
from litpeft.methods.base import Method, delta_state
from litpeft.model import GPT
from litpeft.precision import PRECISIONS, Storage
from litpeft.tokenizer import template_hash

FORMAT = 2


@dataclass
class Run:
    """A trained delta on disk: the folder with delta.json and delta.safetensors."""

    folder: Path
    facts: dict[str, Any]  # delta.json

    @property
    def is_model(self) -> bool:
        """Whether the folder is an ordinary model by itself, since the method trained the base's own weights."""
        return self.facts["holds"] == "model"

    @property
    def storage(self) -> Storage | None:
        """How the base's linear layers were held while the delta was trained; None = as they are."""
        saved = self.facts["base"]["storage"]
        return None if saved is None else Storage(**saved)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the base's weights were held, or came out of their storage."""
        return PRECISIONS[self.facts["precision"]].weights

    @property
    def template(self) -> str:
        return self.facts["template"]["name"]

    @property
    def system(self) -> str | None:
        return self.facts["template"]["system"]

    def method(self) -> Method:
        """Returns the method with the settings that the run was trained with."""
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.facts["settings"].items()}
        return method_class(self.facts["method"])(**settings)

    def delta(self) -> dict[str, Tensor]:
        """Returns the saved tensors; their file must be the one that was written."""
        self.check_files()
        return load_file(self.folder / "delta.safetensors")

    def check_files(self) -> None:
        """Raises unless the tensors' files are those that the run wrote."""
        for name, sha256 in self.facts["files"].items():
            path = self.folder / name
            read_header(path)
            if file_sha256(path) != sha256:
                what = "the file is not the one that the run wrote (sha256 mismatch with delta.json)"
                raise UserError("MODEL-052", what, where=str(path))

    def base_folder(self, moved_to: str | None = None) -> Path:
        """Returns the base model's folder; its weights and template must be those that the run was trained on."""
        saved = self.facts["base"]
        folder = Path(moved_to) if moved_to else Path(saved["path"])
        if not os.path.isdir(folder):  # Path.is_dir would raise for a name that is too long
            hint = "say where it is with --base FOLDER"
            raise UserError("MODEL-053", f"the run's base model is not at {folder}", where=str(self.folder), hint=hint)
        fingerprint = Weights(folder).fingerprint()
        if fingerprint != saved["fingerprint"]:
            what = (
                f"the run was trained on other weights: {folder} has fingerprint {fingerprint[:12]}, "
                f"the run's base {saved['fingerprint'][:12]}"
            )
            raise UserError("MODEL-054", what, where=str(self.folder), hint="say where the right base is with --base")
        if template_hash(folder) != self.facts["template"]["sha256"]:
            what = "the base's chat template is not the one that the run was trained with"
            raise UserError("MODEL-055", what, where=str(folder))
        return folder


def find_run(path: Path) -> Run | None:
    """Returns the run at `path` (a run's folder or its final/), or None if `path` is a model folder."""
    if not os.path.exists(path):
        hint = "give a model folder, a run, or a merged folder; `litpeft download` gets a model of the hub"
        raise UserError("MODEL-050", "there is no such folder", where=str(path), hint=hint)
    if not path.is_dir():
        raise UserError("MODEL-058", "this is a file; a model is a folder", where=str(path))
    for folder in (path / "final", path):
        if (folder / "delta.json").exists():
            facts = read_json(folder / "delta.json", "delta.json of a run")
            where = str(folder / "delta.json")
            if facts.pop("checksum", None) != checksum(facts):
                raise UserError("MODEL-057", "the file is not as the run wrote it (checksum mismatch)", where=where)
            if facts["format"] != FORMAT or facts["method"] not in METHODS:
                what = f"format {facts['format']!r}, method {facts['method']!r}: not of this version of litpeft"
                raise UserError("MODEL-051", what, where=where)
            return Run(folder, facts)
    if (path / "run.yaml").exists():
        hint = "it did not finish; train it again"
        raise UserError("MODEL-056", "this run holds no result (no final/delta.json)", where=str(path), hint=hint)
    return None


def save_result(
    folder: Path, model: GPT, method: str, settings: Method, base: Path, facts: dict[str, Any], first: bool = True
) -> None:
    """Writes what a run learned with all that is needed to use it again; the folder appears as a whole.

    All ranks give their shares of the tensors; the first of them writes.
    """
    if settings.writes_model:
        dtype = settings.result_dtype(model.dtype)
        tensors = _whole_model(model, base, dtype)
    else:
        tensors = ((name, whole(tensor).cpu()) for name, tensor in delta_state(model).items())
    if not first:
        for _ in tensors:
            pass
        return
    with atomic_folder(folder, overwrite=True) as temporary:
        if settings.writes_model:
            write_safetensors(temporary, _finite(tensors, folder))
            copy_companions(base, temporary)
            write_dtype(temporary, dtype)
        else:
            save_tensors({k: v.contiguous() for k, v in _finite(tensors, folder)}, temporary / "delta.safetensors")
        record = {
            "format": FORMAT,
            "litpeft": __version__,
            "holds": "model" if settings.writes_model else "delta",
            "method": method,
            "settings": asdict(settings),
            "files": {path.name: file_sha256(path) for path in sorted(temporary.glob("*.safetensors"))},
            **facts,
        }
        record["checksum"] = checksum(record)
        (temporary / "delta.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _whole_model(model: GPT, base: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields all weights under their Hugging Face names, in this type."""
    own = ((name, whole(tensor).to("cpu", dtype)) for name, tensor in model.state_dict().items())
    return NameMap(*read_config(base)).written(own, where=str(base))


def _finite(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise UserError("NUMERIC-050", f"{name} is not finite: nothing was saved", where=str(folder))
        yield name, tensor


def write_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Says in config.json of which type the weights are; under both names, since readers differ in which they know."""
    path = folder / "config.json"
    config = read_json(path, "config.json of the base")
    name = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config | {"dtype": name, "torch_dtype": name}, indent=2) + "\n", encoding="utf-8")


def base_facts(base: Path, storage: Storage | None, fingerprint: str) -> dict[str, Any]:
    """Returns what says on which weights something was trained."""
    held = None if storage is None else {"name": storage.name, "double_quantize": storage.double_quantize}
    return {"path": str(base.resolve()), "fingerprint": fingerprint, "storage": held}


def checksum(facts: dict[str, Any]) -> str:
    """Returns the sha256 of what delta.json says, by which a later change of it is noticed."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
