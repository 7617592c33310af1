"""The checksums of a base begin as soon as its folder is known, beside the imports of the command that reads it.

They are also what reads the files from the disk. Whatever is wrong with the folder is found, and said, by the command.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from litpeft.core.checksums import CHECKSUMS, begin_sums
from litpeft.core.errors import UserError
from litpeft.core.json import read_json, read_shards

RECORD = "delta.json"


def begin_folders(folders: Iterable[Path]) -> None:
    """Begins the sums of these folders' weights on half of the processors: the imports need one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in folders:
        with suppress(UserError, OSError, ValueError):
            begin_sums([folder / file for file in weight_files(folder)], max(1, usable // 2))


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the files that the index of a folder's weights names; without one that of the only file."""
    index = folder / "model.safetensors.index.json"
    return sorted(set(read_shards(index, ".safetensors").values())) if index.exists() else ["model.safetensors"]


def compared(path: str, base: str | None = None) -> list[Path]:
    """Returns the folder whose sums a command compares that reads `path`: a verified model, or a run's base."""
    with suppress(UserError, OSError, ValueError):
        folder = Path(path)
        place = next((place for place in (folder / "final", folder) if (place / RECORD).is_file()), None)
        if place is None:
            return [folder] if (folder / CHECKSUMS).is_file() else []
        record = read_json(place / RECORD, RECORD)
        if record.get("holds") == "model":
            return [place]
        known = record.get("base")
        named = base or (known.get("path") if isinstance(known, dict) else None)
        return [Path(named)] if isinstance(named, str) else []
    return []
