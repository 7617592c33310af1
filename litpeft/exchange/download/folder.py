"""The files of a model folder; checks that they are complete, and that they fit on the disk."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from litpeft.core.checksums import read_header, tensor_sums, write_checksums
from litpeft.core.errors import ModelError
from litpeft.core.folders import COMPANIONS
from litpeft.core.json import read_json, read_shards

STANDARD_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
INDEX = ".index.json"  # NAME.safetensors.index.json tells which shard holds which tensor


def model_files(names: Collection[str], weights: bool = True) -> list[str]:
    """Returns those of `names` that belong to a model folder: configuration, tokenizer, template, safetensors, index.

    Beside safetensors of the standard names others are left out: they are copies (`consolidated.safetensors`). Without
    `weights` all of them are, and the index.
    """
    if not weights:
        return sorted(name for name in names if name in COMPANIONS)
    pattern = STANDARD_WEIGHTS if any(map(STANDARD_WEIGHTS.fullmatch, names)) else WEIGHTS
    return sorted(name for name in names if name in COMPANIONS or pattern.fullmatch(name.removesuffix(INDEX)))


def check_folder(folder: Path) -> None:
    """Raises unless config.json can be read, every safetensors file is complete and every shard of an index is here."""
    read_json(folder / "config.json", "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError("the folder holds no *.safetensors file", where=folder, hint="run the same command again")
    for path in weights:
        read_header(path)
    for path in sorted(folder.glob(f"*.safetensors{INDEX}")):
        for shard in sorted(set(read_shards(path, ".safetensors").values())):
            if not os.path.isfile(folder / shard):  # Path.is_file would raise for a name that is too long
                hint = "run the same command again; if it stays, the source itself is incomplete"
                raise ModelError(f"names {shard}, which is missing", where=path, hint=hint)


def keep_checksums(folder: Path, origin: str) -> None:
    """Writes the checksums of weights that were verified against the source."""
    sums = [tensor_sums(path) for path in sorted(folder.glob("*.safetensors"))]
    write_checksums(folder, {name: digest for part in sums for name, digest in part.items()}, origin)
