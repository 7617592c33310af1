"""An adapter of peft, read as a run: adapter_config.json and adapter_model.safetensors (or .bin) beside a base.

Which modules it has is decided by the config, as peft does it, and must be what the file of tensors holds.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.checksums import hub_origin, read_header
from litpeft.core.errors import ConfigError, ModelError, UserError
from litpeft.core.recognise import ADAPTER, ADAPTER_TENSORS, refuse_other
from litpeft.core.safetensors import DTYPES
from litpeft.core.terminal import command_line
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.imports.peft_delta import Learned, learned
from litpeft.exchange.imports.peft_keys import Keys, read_keys
from litpeft.exchange.result import Run
from litpeft.model.build import checked_files
from litpeft.model.delta import Method

FILES = (ADAPTER_TENSORS, "adapter_model.bin")


@dataclass
class PeftRun(Run):
    """An adapter of peft: a run without a record of its training."""

    keys: Keys
    learned: Learned | None = None  # known with the base

    @classmethod
    def read(cls, folder: Path) -> "PeftRun":
        template = {"name": "auto", "system": None}
        base = {"storage": None}
        facts = {"holds": "delta", "method": "peft", "base": base, "precision": "32-true", "template": template}
        return cls(folder, facts, read_keys(folder))

    @property
    def learned_file(self) -> Path:
        return next((path for name in FILES if (path := self.folder / name).exists()), self.folder / FILES[0])

    def check_files(self) -> None:
        """Its tensors are checked as they are read."""

    def progress(self) -> None:
        """Nothing is known of its training."""

    def check_base(self, folder: Path) -> None:
        """Nothing is known of the base's weights."""

    def find_base(self, moved_to: str | None = None) -> Path:
        """Returns the base's folder: `moved_to`, or where the config says, or where `litpeft download` puts it."""
        named = self.keys.base_model_name_or_path
        places = [moved_to] if moved_to else [named, f"checkpoints/{named}"] if named else []
        folder = next((Path(place) for place in places if is_folder(place)), None)
        if folder is None:
            what = f"its base model {moved_to or named or '(base_model_name_or_path is not set)'} is not there"
            hint = "say where it is with --base FOLDER"
            if named and not moved_to and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", named):
                hint += f"; if it is on the hub, `{command_line('download', named)}` fetches it"
            raise ModelError(what, where=self.folder / ADAPTER, hint=hint)
        if not moved_to:
            self._check_revision(folder)
        refuse_other(folder)
        _, weights, names = checked_files(folder)
        try:
            self.learned = learned(self.keys, read_tensors(self.folder), names, weights)
        except (ConfigError, ValueError) as error:  # a ConfigError would name keys of ours
            what = error.what if isinstance(error, UserError) else str(error)
            raise ModelError(what, where=self.folder, hint=f"the base is {folder}; --base names another") from None
        return folder

    def _check_revision(self, base: Path) -> None:
        """Raises if the base was downloaded at another commit than the one that the config names."""
        wanted, origin = self.keys.revision or "", hub_origin(base)
        if origin and re.fullmatch(r"[0-9a-f]{40}", wanted) and origin[1] != wanted:
            what = f"revision is {wanted} of {origin[0]}, and {base} holds {origin[1]}"
            fetch = command_line("download", f"{origin[0]}@{wanted}", "--out", "FOLDER")
            hint = f"`{fetch}` fetches it, then give --base FOLDER; --base {base} takes this one"
            raise ModelError(what, where=self.folder / ADAPTER, hint=hint)

    def method(self, changes: Mapping[str, Any] | None = None) -> Method:
        if changes:
            raise ConfigError("an adapter of peft has no keys that may change", where="method")
        return self.learned[0]

    def delta(self) -> dict[str, Tensor]:
        return self.learned[1]

    def tokenizer_and_template(
        self, folder: Path, options: Mapping[str, Any] | None = None
    ) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = Tokenizer.load(self.texts(folder))
        return tokenizer, ChatTemplate(tokenizer, options=options, is_setting=False)

    def texts(self, base: Path) -> Path:
        """Returns the adapter's folder if a tokenizer lies beside it, as trainers save it, or else the base's."""
        own = any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        return self.folder if own else base


def is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, in float32 or better."""
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise ModelError(f"there is no {FILES[0]} beside {ADAPTER}", where=folder)
    if path.suffix == ".safetensors":
        read_header(path)
        tensors = load_file(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            said = " ".join(str(error).split())[:200]
            raise ModelError(f"not a whole file of tensors: {said}", where=path) from None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            raise ModelError(f"{name} must be a tensor of F64, F32, F16 or BF16", where=path)
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds numbers that are not finite", where=path)
    return {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}
