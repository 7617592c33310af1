"""What a run leaves behind and how it is read again: delta.safetensors, delta.json, and what they were trained on."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft import __version__
from litpeft.checkpoint import Weights, atomic_folder, file_sha256, read_header, save_tensors
from litpeft.config import read_json
from litpeft.errors import UserError
from litpeft.methods import METHODS, method_class
from litpeft.methods.base import Method
from litpeft.tokenizer import Tokenizer

FORMAT = 1


@dataclass
class Run:
    """A trained delta on disk: the folder with delta.json and delta.safetensors."""

    folder: Path
    facts: dict[str, Any]  # delta.json

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
        path = self.folder / "delta.safetensors"
        read_header(path)
        if file_sha256(path) != self.facts["sha256"]:
            what = "the file is not the one that the run wrote (sha256 mismatch with delta.json)"
            raise UserError("MODEL-052", what, where=str(path))
        return load_file(path)

    def base_folder(self, moved_to: str | None = None) -> Path:
        """Returns the base model's folder; its weights and template must be those that the run was trained on."""
        saved = self.facts["base"]
        folder = Path(moved_to) if moved_to else Path(saved["path"])
        if not folder.is_dir():
            hint = "say where it is with --base FOLDER"
            raise UserError("MODEL-053", f"the run's base model is not at {folder}", where=str(self.folder), hint=hint)
        fingerprint = Weights(folder).fingerprint()
        if fingerprint != saved["fingerprint"]:
            what = (
                f"the run was trained on other weights: {folder} has fingerprint {fingerprint[:12]}, "
                f"the run's base {saved['fingerprint'][:12]}"
            )
            raise UserError("MODEL-054", what, where=str(self.folder), hint="say where the right base is with --base")
        template = Tokenizer.load(folder).template_hash
        if template != self.facts["template"]["sha256"]:
            what = "the base's chat template is not the one that the run was trained with"
            raise UserError("MODEL-055", what, where=str(folder))
        return folder


def find_run(path: Path) -> Run | None:
    """Returns the run at `path` (a run's folder or its final/), or None if `path` is a model folder."""
    if not path.exists():
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


def save_delta(
    folder: Path, state: dict[str, Tensor], method: str, settings: Method, base: Path, facts: dict[str, Any]
) -> None:
    """Writes a delta with all that is needed to use it again; the folder appears as a whole."""
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError("NUMERIC-050", f"{bad[0]} is not finite: nothing was saved", where=str(folder))
    with atomic_folder(folder, overwrite=True) as temporary:
        save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / "delta.safetensors")
        record = {
            "format": FORMAT,
            "litpeft": __version__,
            "method": method,
            "settings": asdict(settings),
            "base": {"path": str(base.resolve()), "fingerprint": Weights(base).fingerprint()},
            "sha256": file_sha256(temporary / "delta.safetensors"),
            **facts,
        }
        record["checksum"] = checksum(record)
        (temporary / "delta.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def checksum(facts: dict[str, Any]) -> str:
    """Returns the sha256 of what delta.json says, by which a later change of it is noticed."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
