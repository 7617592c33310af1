"""The kinds of files that rows are read from. One is a file here and an entry of READERS.

A reader takes the open file, unpacked, and its name, and yields a Record for every row: with the row, or with what is
wrong with it. What makes all later rows uncertain is a DataError. What a row means is up to litpeft/data/formats.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from litpeft.core.errors import DataError
from litpeft.data.readers import arrow, excel, json_list, jsonl, separated, text
from litpeft.data.readers.bytes import PACKINGS, STDIN, first_bytes, opened, shown
from litpeft.data.readers.record import Record

READERS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    ".json": json_list.read,
    ".jsonl": jsonl.read,
    ".csv": separated.read,
    ".tsv": separated.read_tsv,
    ".xlsx": excel.read,
    ".parquet": arrow.read_parquet,
    ".arrow": arrow.read_arrow,
    ".txt": text.read,
}
ALL = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}, perhaps followed by {', '.join(PACKINGS)}"


def kind(path: Path) -> tuple[str, str]:
    """Returns the ending that says how a file is read, and that of its packing; "" for one that there is not."""
    if str(path) == STDIN:
        return (".json" if first_bytes(path) == b"[" else ".jsonl"), ""
    packing = path.suffix.lower() if path.suffix.lower() in PACKINGS else ""
    ending = Path(path.stem if packing else path.name).suffix.lower()
    return ending if ending in READERS else "", packing


def records(path: Path | str, documents: text.Documents = "file", name: str = "") -> Iterator[Record]:
    """Yields the rows of a file in order, those with a problem too; `documents` is what plain text is cut into.

    Messages call the file `name`; default: its path.
    """
    path = Path(path)
    ending, packing = kind(path)
    if not ending:
        raise DataError(f"a data file ends in {ALL}, got {path.name!r}", where=name or path)
    read = partial(text.read, documents=documents) if ending == ".txt" else READERS[ending]
    with opened(path, packing, name) as handle:
        yield from read(handle, name or shown(path))
