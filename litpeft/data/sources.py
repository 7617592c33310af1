"""Finds the files of a data set: a file, a folder, a glob, standard input, a set of the hub; or several of them."""

import os
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from litpeft.core.errors import DataError, some
from litpeft.data.hub.address import Address, address, no_file
from litpeft.data.hub.layout import HELD_OUT, TEST, TRAIN
from litpeft.data.presets import Preset
from litpeft.data.readers import ALL, STDIN, kind, records, shown
from litpeft.data.readers.record import Record
from litpeft.data.readers.text import Documents

if TYPE_CHECKING:
    from litpeft.data.hub.fetch import Found

OTHERS = ("test", "readme", "license", "licence")  # names of files in a folder of rows that are neither
KINDS = {".xls": "old Excel", ".ods": "OpenDocument", ".feather": "Feather", ".zip": "zip", ".7z": "7z", ".tar": "tar"}

Paths = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class Source:
    """A file of rows, and how often each of its rows is seen in an epoch; 0.5: a half of them once."""

    path: Path
    weight: float = 1.0
    address: str = ""  # of a file of the hub: what data.path takes to read it alone
    name: str = ""  # of a file of the hub, for messages
    preset: Preset | None = None  # says what the rows mean

    def __str__(self) -> str:
        """Returns what data.path takes to read this file."""
        return self.address or str(self.path)

    @property
    def shown(self) -> str:
        """Returns the file as messages name it."""
        return self.name or shown(self.path)

    def records(self, documents: Documents) -> Iterator[Record]:
        """Yields the rows in order, those with a problem too."""
        found = records(self.path, documents, self.name)
        return self.preset.rows(found) if self.preset else found


def find(paths: Paths, validation_path: str | None, prefix: str = "data.") -> tuple[list[Source], list[Source]]:
    """Returns the files of rows to train on and those of held-out rows, if there are any.

    `prefix` is that of the two settings, for messages.
    """
    weights = paths if isinstance(paths, Mapping) else dict.fromkeys([paths] if isinstance(paths, str) else paths, 1.0)
    train = [replace(source, weight=weight) for path, weight in weights.items() for source in _sources(path, prefix)]
    seen: set[str] = set()
    for source in train:
        real = os.path.realpath(source.path)
        if real in seen:
            raise DataError(f"{prefix}path names this file twice", where=source.shown, hint="a weight repeats its rows")
        seen.add(real)
    if validation_path:
        if os.path.isdir(validation_path):
            raise DataError(f"{prefix}validation_path must be a file, this is a folder", where=validation_path)
        return train, find_measured(validation_path)
    return train, [source for path in weights for source in _held_out(path, prefix)]


def find_measured(path: str) -> list[Source]:
    """Returns the files of rows to measure on: held-out rows, of a set of the hub also test rows, else all rows."""
    named = address(path)
    if named is None:
        return [Source(file) for file in (_called(Path(path), HELD_OUT) if os.path.isdir(path) else []) or _files(path)]
    if named.shape and named.shape.held_out and not named.rest:
        return _of_hub(named.part(named.shape.held_out))
    meant = _look_up(_trained(named))
    split = meant.parts.measured()
    return _fetched(meant, meant.parts.splits[split]) if split else _sources(path)


def pinned(paths: Paths) -> Paths:
    """Returns paths with the commits that their sets of the hub have now; paths on this disk as they are."""
    if isinstance(paths, Mapping):
        return {_pinned(path): weight for path, weight in paths.items()}
    return _pinned(paths) if isinstance(paths, str) else tuple(map(_pinned, paths))


def _pinned(path: str) -> str:
    named = address(path)
    return path if named is None else str(replace(_look_up(_trained(named)).address, rest=named.rest))


def _sources(path: str, prefix: str | None = None) -> list[Source]:
    """Returns the files of rows to train on that a path stands for."""
    named = address(path)
    return [Source(file) for file in _files(path, prefix)] if named is None else _of_hub(_trained(named))


def _held_out(path: str, prefix: str) -> list[Source]:
    """Returns the files of held-out rows beside those that a path stands for."""
    named = address(path)
    if named is None:
        held_out = _called(Path(path), HELD_OUT, f"{prefix}validation_path") if os.path.isdir(path) else []
        return [Source(file) for file in held_out]
    if named.shape and named.shape.train and not named.rest:
        return _of_hub(named.part(named.shape.held_out)) if named.shape.held_out else []
    meant = _look_up(named)
    return _fetched(meant, meant.parts.held_out())


def found_parts(named: Address) -> "tuple[Found, list[str]]":
    """Returns what an address of the hub means, and its files: to train on, held-out rows and those of a test."""
    meant, shape = _look_up(_trained(named)), named.shape
    if shape and shape.held_out and not named.rest:
        return meant, [*meant.parts.train(), *_look_up(named.part(shape.held_out)).parts.train()]
    splits = (*TRAIN, *HELD_OUT, *TEST)
    others = [file for split, files in meant.parts.splits.items() if split in splits for file in files]
    return meant, list(dict.fromkeys([*meant.parts.train(), *others]))


def _trained(named: Address) -> Address:
    """Returns the address of the rows to train on: a preset's may have a name of their own."""
    return named if named.rest or not named.shape else named.part(named.shape.train or None)


def _of_hub(named: Address) -> list[Source]:
    meant = _look_up(named)
    return _fetched(meant, meant.parts.train())


def _look_up(named: Address) -> "Found":
    from litpeft.data.hub.fetch import look_up  # it imports huggingface_hub, which takes a while

    return look_up(named)


def _fetched(meant: "Found", names: list[str]) -> list[Source]:
    """Returns files of the hub, which are fetched if the cache lacks them."""
    where = replace(meant.address, revision=None, config=None, preset=None)
    addresses = [replace(meant.address.part(name), config=None) for name in names]
    return [
        Source(path, address=str(at), name=str(where.part(name)), preset=meant.address.shape)
        for path, at, name in zip(meant.fetch(names), addresses, names, strict=True)
    ]


def _files(path: str, prefix: str | None = None) -> list[Path]:
    """Returns the files that a path stands for, in the order of their names."""
    if path == STDIN or os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        option = "" if prefix is None else f"{prefix}path"
        return _called(Path(path), TRAIN, option) or _all_of(Path(path))
    matches = sorted(glob(path, recursive=True)) if has_magic(path) else []
    there = [Path(name) for name in matches if os.path.isfile(name)]
    if not there:
        raise no_file(path, "no file matches" if has_magic(path) else "there is no such file or folder")
    return there


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
    files = shlex.quote(f"{folder}/*{''.join(kind(found[0]))}") if found else ""
    hint = f"call one of them train, as in train.jsonl, or name the files: {files}"
    raise DataError(what, where=folder, hint=hint if found else f"a data file ends in {ALL}")


def _not_read(path: Path) -> DataError:
    word = KINDS.get(path.suffix, path.suffix)
    return DataError(f"{word} is not read; a data file ends in {ALL}", where=path, hint=f"convert {path.name}")


def split(rows: int, share: float, seed: int) -> np.ndarray:
    """Returns for each of so many rows whether it is held out; at least one is, and one is not, if share > 0."""
    held_out = np.zeros(rows, bool)
    if share > 0 and rows > 1:
        count = min(max(1, round(share * rows)), rows - 1)
        held_out[random.Random(seed).sample(range(rows), count)] = True
    return held_out


def repeated(rows: int, weight: float, seed: int) -> np.ndarray:
    """Returns how often each of so many rows is seen: with weight 2.5 each twice, and a half of them once more."""
    whole, part = divmod(weight, 1)
    times = np.full(rows, int(whole))
    times[random.Random(seed).sample(range(rows), round(part * rows))] += 1
    return times
