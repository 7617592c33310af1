"""Finds the files of a data set: a file, a folder, a glob, standard input, or several of them with weights."""

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NoReturn

from litpeft.core.errors import DataError, quoted, some
from litpeft.data.readers import ALL, READERS, STDIN, kind

TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval")  # names of files of held-out rows
OTHERS = ("test", "readme", "license", "licence")  # names of files in a folder of rows that are neither
KINDS = {".xls": "old Excel", ".ods": "OpenDocument", ".feather": "Feather", ".zip": "zip", ".7z": "7z", ".tar": "tar"}

Paths = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class Source:
    """A file of rows, and how often each of its rows is seen in an epoch; 0.5: a half of them once."""

    path: Path
    weight: float = 1.0


def find(paths: Paths, validation_path: str | None, prefix: str = "data.") -> tuple[list[Source], list[Path]]:
    """Returns the files of rows to train on and those of held-out rows, if there are any.

    `prefix` is that of the two settings, for messages.
    """
    weights = paths if isinstance(paths, Mapping) else dict.fromkeys([paths] if isinstance(paths, str) else paths, 1.0)
    train = [Source(file, weight) for path, weight in weights.items() for file in _files(path, prefix)]
    seen: set[str] = set()
    for source in train:
        real = os.path.realpath(source.path)
        if real in seen:
            raise DataError(f"{prefix}path names this file twice", where=source.path, hint="a weight repeats its rows")
        seen.add(real)
    if validation_path:
        if os.path.isdir(validation_path):
            raise DataError(f"{prefix}validation_path must be a file, this is a folder", where=validation_path)
        return train, _files(validation_path, prefix)
    folders = [Path(path) for path in weights if os.path.isdir(path)]
    return train, [file for folder in folders for file in _called(folder, HELD_OUT, f"{prefix}validation_path")]


def find_measured(path: str) -> list[Path]:
    """Returns the files of rows to measure on: in a folder those of held-out rows, else those of rows to train on."""
    return (_called(Path(path), HELD_OUT) if os.path.isdir(path) else []) or _files(path)


def _files(path: str, prefix: str | None = None) -> list[Path]:
    """Returns the files that a path stands for, in the order of their names."""
    if path == STDIN or os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        option = "" if prefix is None else f"{prefix}path"
        return _called(Path(path), TRAIN, option) or _all_of(Path(path))
    matches = sorted(glob(path, recursive=True)) if has_magic(path) else []
    found = [Path(name) for name in matches if os.path.isfile(name)]
    if not found:
        raise DataError("no file matches" if has_magic(path) else "there is no such file or folder", where=path)
    return found


def _called(folder: Path, names: tuple[str, ...], option: str = "") -> list[Path]:
    """Returns the one file with such a name, train.csv, or all of its shards, train-00000-of-00002.parquet.

    `option` is the setting that could choose one where several are meant.
    """
    found = [path for path in _present(folder) if _word(path) in names and (any(kind(path)) or path.suffix in KINDS)]
    for path in found:  # another kind of file with such a name must not be ignored
        if not kind(path)[0]:
            raise _not_read(path)
    whole = [path for path in found if path.name.partition(".")[0].lower() in names]
    if len(found) > 1 and (whole or len({_word(path) for path in found}) > 1):
        what = f"several files could be meant: {', '.join(path.name for path in found)}"
        hint = "keep one of them, or name the file itself" + (f": {option}" if option else " instead of the folder")
        raise DataError(what, where=folder, hint=hint)
    return found


def _all_of(folder: Path) -> list[Path]:
    """Returns the files of rows in a folder where none is called train; they must be of one kind."""
    present = [path for path in _present(folder) if _word(path) not in (*HELD_OUT, *OTHERS)]
    found = [path for path in present if kind(path)[0]]
    if len({kind(path)[0] for path in found}) == 1:
        return found
    if not found and present and present[0].suffix in KINDS:
        raise _not_read(present[0])
    _refuse_folder(folder, found)


def _present(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def _word(path: Path) -> str:
    """Returns the word that a file's name begins with: train of train-00000-of-00002.parquet."""
    return re.match("[a-z]*", path.name.lower())[0]


def _refuse_folder(folder: Path, found: list[Path]) -> NoReturn:
    what = f"no file called train in it, but {some([path.name for path in sorted(folder.iterdir())]) or 'nothing'}"
    hint = f"call one of them train, as in train.jsonl, or name the files: {quoted(f'{folder}/*{next(iter(READERS))}')}"
    raise DataError(what, where=folder, hint=hint if found else f"a data file ends in {ALL}")


def _not_read(path: Path) -> DataError:
    word = KINDS.get(path.suffix, path.suffix)
    return DataError(f"{word} is not read; a data file ends in {ALL}", where=path, hint=f"convert {path.name}")


def split(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Returns the rows to train on and those held out, in their order; at least one of each if share > 0."""
    if share <= 0 or len(rows) < 2:
        return rows, []
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in held_out], [r for i, r in enumerate(rows) if i in held_out]


def repeated(rows: list[Any], weight: float, seed: int) -> list[Any]:
    """Returns the rows as often as the weight says, in their order: 2.5 is each twice, and a half of them once more."""
    whole, part = divmod(weight, 1)
    more = set(random.Random(seed).sample(range(len(rows)), round(part * len(rows))))
    return [row for at, row in enumerate(rows) for _ in range(int(whole) + (at in more))]
