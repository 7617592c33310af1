"""Finds the files of a data set and reads .json and .jsonl strictly, row by row with the line of each."""

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from litpeft.core.errors import DataError, quoted, some
from litpeft.data.formats import EXAMPLES

SUFFIXES = (".json", ".jsonl")
KINDS = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow", ".xlsx": "Excel", ".txt": "plain text"}
PACKED = {".gz": "gzip", ".zst": "Zstandard", ".xz": "xz", ".bz2": "bzip2", ".zip": "zip"}
TRAIN = ("train",)
HELD_OUT = ("validation", "valid", "val", "dev")  # names of a file of held-out rows
SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "parquet", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True)
class Record:
    """A row as it was read, or why it cannot be used."""

    where: str  # file:line
    value: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row that is left out, for rejected.jsonl."""

    where: str  # file:line
    reason: str


class StrictDecoder:
    """Reads JSON and notes what Python's reader lets pass as the row's flaw, so that the next row can be read."""

    def __init__(self) -> None:
        self.flaw = ""
        self._scan = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        ).raw_decode

    def __call__(self, text: str, start: int) -> tuple[Any, int, str]:
        """Returns the value at `start`, the index after it, and its flaw or ""; raises ValueError if it is not JSON."""
        self.flaw = ""
        try:
            value, end = self._scan(text, start)
            if not self.flaw and text.find("\\u", start, end) >= 0:
                self._characters(value)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return value, end, self.flaw

    def _note(self, flaw: str) -> None:
        self.flaw = self.flaw or flaw

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            self._note(f"the key {quoted(next(key for key in keys if keys.count(key) > 1))} appears twice")
        return result

    def _constant(self, name: str) -> None:
        self._note(f"{name} is not a JSON number")

    def _int(self, digits: str) -> int:
        if len(digits) > 1000:
            self._note(f"a number has {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            self._note(f"the number {digits[:20]} is too large")
        return value

    def _characters(self, value: Any) -> None:
        """Notes what only escapes can spell: a lone surrogate, or NUL."""
        plain = json.dumps(value, ensure_ascii=False)
        if SURROGATE.search(plain):
            self._note("it holds a lone surrogate, which is no character")
        elif "\\u0000" in plain.replace("\\\\", ""):
            self._note("it holds a NUL character")


def records(path: Path) -> Iterator[Record]:
    """Yields the rows of a file in order, those with a problem too."""
    if path.suffix.lower() not in SUFFIXES:
        raise _not_read(path)
    try:
        with open(path, "rb") as handle:
            head = handle.read(4)
            for magic, kind in MAGIC.items():
                if head.startswith(magic):
                    hint = "unpack or convert it to UTF-8 text"
                    raise DataError(f"the file is {kind}, not JSON in UTF-8", where=path, hint=hint)
            handle.seek(0)
            yield from _lines(path, handle) if path.suffix.lower() == ".jsonl" else _elements(path, handle.read())
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def _lines(path: Path, handle: Iterator[bytes]) -> Iterator[Record]:
    """Yields the rows of JSON Lines, blank lines left out. Only \\n ends a line: U+2028 may stand inside a string."""
    decode = StrictDecoder()
    for number, raw in enumerate(handle, 1):
        where = f"{path}:{number}"
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8").rstrip(" \t\r\n")
        except UnicodeDecodeError as error:
            yield Record(where, problem=f"not UTF-8 at byte {error.start + 1}")
            continue
        if not text:
            continue
        if number == 1 and text.lstrip() == "[":
            hint = "one row stands on one line of a .jsonl file; a list of rows belongs into a .json file"
            raise DataError("this is a JSON list, not JSON Lines", where=where, hint=hint)
        try:
            value, end, flaw = decode(text, _skip(text, 0))
            if not flaw and end < len(text):
                flaw = f"there is more after the end of the row, at column {_skip(text, end) + 1}"
            yield Record(where, value, flaw)
        except json.JSONDecodeError as error:
            yield Record(where, problem=f"not JSON at column {error.colno}: {error.msg}")
        except ValueError as error:
            yield Record(where, problem=str(error))


def _elements(path: Path, raw: bytes) -> Iterator[Record]:
    """Yields the rows of one JSON list. A syntax error is an error of the file: no later row can be found."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"not UTF-8 at byte {error.start + 1}", where=f"{path}:{line}") from None
    decode, position = StrictDecoder(), _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        hint = "if every line is a row, the file's name should end in .jsonl"
        raise DataError("a .json file must be a list of rows: [{...}, {...}]", where=path, hint=hint)

    def fault(what: str, place: int) -> DataError:
        return DataError(what, where=f"{path}:{text.count(chr(10), 0, place) + 1}")

    line, counted = 1, 0
    position = _skip(text, position + 1)
    separator = "]" if text.startswith("]", position) else ","
    while separator == ",":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end, flaw = decode(text, position)
        except json.JSONDecodeError as error:
            raise fault(f"not JSON at column {error.colno}: {error.msg}", error.pos) from None
        except ValueError as error:
            raise fault(str(error), position) from None
        yield Record(f"{path}:{line}", value, flaw)
        position = _skip(text, end)
        separator = text[position : position + 1]
        if separator not in ("]", ","):
            raise fault(f"expected , or ] after a row, got {separator or 'the end'!r}", position)
        if separator == ",":
            position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise fault("there is more after the end of the list", rest)


def _skip(text: str, position: int) -> int:
    return SPACE.match(text, position).end()


def find(path: str, validation_path: str | None) -> tuple[Path, Path | None]:
    """Returns the file of rows to train on and that of held-out rows, if there is one."""
    train, held_out = _existing(path), _existing(validation_path) if validation_path else None
    if held_out is not None and held_out.is_dir():
        raise DataError("data.validation_path must be a file, this is a folder", where=held_out)
    if not train.is_dir():
        return train, held_out
    rows = _one_of(train, TRAIN, "data.path") or _refuse_folder(train, TRAIN)
    return rows, held_out or _one_of(train, HELD_OUT, "data.validation_path")


def find_measured(path: str) -> Path:
    """Returns the file of rows to measure on: in a folder that of held-out rows, else that of rows to train on."""
    folder = _existing(path)
    if not folder.is_dir():
        return folder
    return _one_of(folder, HELD_OUT) or _one_of(folder, TRAIN) or _refuse_folder(folder, (*HELD_OUT, *TRAIN))


def _existing(path: str) -> Path:
    if not os.path.exists(path):
        raise DataError("there is no such file or folder", where=path)
    return Path(path)


def _one_of(folder: Path, names: tuple[str, ...], option: str = "") -> Path | None:
    """Returns the one file of rows with such a name; `option` is the setting that could choose one."""
    found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) > 1:
        what = f"several files could be meant: {', '.join(path.name for path in found)}"
        hint = "keep one of them, or name the file itself" + (f": {option}" if option else " instead of the folder")
        raise DataError(what, where=folder, hint=hint)
    if found:
        return found[0]
    for path in sorted(folder.iterdir()):  # a table with such a name must not be ignored
        if path.name.partition(".")[0] in names and _other(path)[0]:
            raise _not_read(path)
    return None


def _refuse_folder(folder: Path, names: tuple[str, ...]) -> NoReturn:
    present = sorted(folder.iterdir())
    what = f"no {names[0]}.json or {names[0]}.jsonl in it, but {some([p.name for p in present]) or 'nothing'}"
    if any(p.suffix.lower() in SUFFIXES for p in present):
        hint = f"name the file itself, or call it {names[0]}.jsonl"
    else:
        hint = next((_other(p)[1] for p in present if _other(p)[0]), f"put the rows into {names[0]}.jsonl")
    raise DataError(what, where=folder, hint=hint)


def _not_read(path: Path) -> DataError:
    kind, hint = _other(path)
    what = f"{kind} is not read" if kind else f"got {path.name!r}"
    return DataError(f"a data file ends in .json or .jsonl, {what}", where=path, hint=hint)


def _other(path: Path) -> tuple[str, str]:
    """Returns the kind of a file of rows that is not read, by its name, or "", and how to convert it."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        return PACKED[suffix], f"unpack {path.name}"
    return KINDS.get(suffix, ""), f"make {path.stem}.jsonl of it, each row a line: {EXAMPLES}"


def split(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Returns the rows to train on and those held out, in their order; at least one of each if share > 0."""
    if share <= 0 or len(rows) < 2:
        return rows, []
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in held_out], [r for i, r in enumerate(rows) if i in held_out]
