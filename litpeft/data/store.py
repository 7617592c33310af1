"""Rows of tokens in a file instead of in memory: for each, a process holds its entry of the index, and no more."""

import hashlib
import json
import os
import struct
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, BinaryIO

import numpy as np

from litpeft.core.errors import ResourceError
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.rows import Row

# a row: this head, the ids as int32, a byte for each that says whether it is trained, in a weighted row its weight as
# float64, and its file:line
HEAD = struct.Struct("<qqi")  # where its turns are, their bytes, and the tokens before the first trained one
ENTRY = np.dtype(
    [
        *(("at", "<i8"), ("bytes", "<i4"), ("tokens", "<i4"), ("trained", "<i4"), ("hash", "<u8")),
        *(("example", "<i4"), ("file", "<i4"), ("ended", "?"), ("plain", "?"), ("weighted", "?"), ("part", "i1")),
    ]
)
PACKED = struct.Struct("<qiiiQii???b")  # the bytes of an entry
WHOLE, CHOSEN, REJECTED = 0, 1, 2  # `part` of an entry: the rejected answer of a pair comes after the chosen one
FIELDS = [field.name for field in fields(Turn)]


class Turns(Sequence[Turn]):
    """The turns of a row, read from the file when they are looked at: training does not need them."""

    def __init__(self, descriptor: "Descriptor", at: int, size: int):
        self._place = descriptor, at, size

    def _read(self) -> list[Turn]:
        descriptor, at, size = self._place
        return [Turn(*map(_tuples, values)) for values in json.loads(descriptor.read(at, size))]

    def __getitem__(self, at: Any) -> Any:
        return self._read()[at]

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        return list(self) == (list(other) if isinstance(other, Sequence) else other)

    __hash__ = None


def _tuples(value: Any) -> Any:
    """Returns a field of a turn as it was: JSON has lists for tuples."""
    return tuple(tuple(one) if isinstance(one, list) else one for one in value) if isinstance(value, list) else value


def unwritable(error: OSError) -> ResourceError:
    """Returns the error of rows that cannot be written."""
    what, hint = f"the tokens of the rows cannot be written: {error.strerror or error}", "make room there"
    return ResourceError(what, where=tempfile.gettempdir(), hint=f"{hint}, or name another folder in TMPDIR")


class Descriptor:
    """A file to read from; it is closed when nobody needs it any more, and may be unnamed."""

    def __init__(self, handle: BinaryIO):
        try:
            handle.flush()
        except OSError as error:
            raise unwritable(error) from None
        self.number = os.dup(handle.fileno())
        weakref.finalize(self, os.close, self.number)

    def read(self, at: int, size: int) -> bytes:
        """Returns bytes of the file; raises if it has become shorter."""
        data = os.pread(self.number, size, at)
        if len(data) < size:
            raise ResourceError("the file that holds the tokens of the rows was cut while it was read")
        return data


class Rows(Sequence[Row]):
    """Rows of a file, or some of them, in an order in which one may stand several times.

    Of a pair the chosen answer is the row, which has the other one in it. `references` (entries, 2) are those of pairs,
    nan where they are not known.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        index: np.ndarray,
        order: np.ndarray | None = None,
        references: np.ndarray | None = None,
    ):
        self._descriptor, self._index, self._references = descriptor, index, references
        self._order = np.flatnonzero(index["part"] != REJECTED).astype(np.int32) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.where(at)
        number = self._order[at]
        row = self._read(self._index[number])
        if self._index[number]["part"] != CHOSEN:
            return row
        known = None if self._references is None else tuple(self._references[number].tolist())
        return replace(row, rejected=self._read(self._index[number + 1]), references=known)

    def _read(self, entry: np.void) -> Row:
        tokens, data = int(entry["tokens"]), self._descriptor.read(int(entry["at"]), int(entry["bytes"]))
        turns_at, turns, prompt = HEAD.unpack_from(data)
        ids = np.frombuffer(data, "<i4", tokens, HEAD.size).tolist()
        trained = np.frombuffer(data, "?", tokens, HEAD.size + 4 * tokens).tolist()
        end, weights = HEAD.size + 5 * tokens, None
        if entry["weighted"]:
            weights, end = np.frombuffer(data, "<f8", tokens, end).tolist(), end + 8 * tokens
        source, turns = data[end:].decode(errors="surrogateescape"), Turns(self._descriptor, turns_at, turns)
        return Row(ids, trained, prompt, source, turns, bool(entry["ended"]), weights)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """Returns a field of the rows' entries: tokens; trained, how many of them are; hash, of the tokens; ...

        The tokens of a pair are those of both answers together; longest are those of the longer one.
        """
        own = self._index["tokens" if name == "longest" else name][self._order]
        if not self.paired or name not in ("tokens", "trained", "longest"):
            return own
        beside = self._index["trained" if name == "trained" else "tokens"][self._order + 1]
        return np.maximum(own, beside) if name == "longest" else own + beside

    @property
    def paired(self) -> bool:
        """Whether the rows are pairs of answers."""
        return bool(len(self)) and bool(self._index["part"][self._order[0]])

    def referenced(self, places: np.ndarray, values: np.ndarray) -> "Rows":
        """Returns the rows, of which those at these places have the `values` (places, 2) as references."""
        references = np.full((len(self._index), 2), np.nan) if self._references is None else self._references.copy()
        references[self._order[places]] = values
        return Rows(self._descriptor, self._index, self._order, references)

    def distinct(self) -> np.ndarray:
        """Returns the place of each row where it stands first: a weight of its file repeats it."""
        return np.sort(np.unique(self.column("at"), return_index=True)[1])

    def examples(self) -> np.ndarray:
        """Returns the place of the first row of each example; a long one is cut into several."""
        numbers = self.column("file").astype(np.int64) << 32 | self.column("example")
        return np.sort(np.unique(numbers, return_index=True)[1])

    def begin_with(self, ids: Sequence[int]) -> int:
        """Returns how many rows begin with these tokens."""
        first = array("i", ids).tobytes()
        long = self.where(self._index["tokens"][self._order] >= len(ids))
        return sum(long._descriptor.read(int(at) + HEAD.size, len(first)) == first for at in long.column("at"))

    def trained_bytes(self) -> Iterator[bytes]:
        """Yields what training sees of each row as it lies in the file: ids, mask and, where there are, weights."""
        order = np.stack((self._order, self._order + 1), 1).reshape(-1) if self.paired else self._order
        fields = (self._index[name][order] for name in ("at", "tokens", "weighted"))
        for at, tokens, weighted in zip(*fields, strict=True):
            yield self._descriptor.read(int(at) + HEAD.size, (13 if weighted else 5) * int(tokens))

    def where(self, chosen: np.ndarray | slice) -> "Rows":
        """Returns the rows at these places, or those for which an array of bools is true."""
        return Rows(self._descriptor, self._index, self._order[chosen], self._references)


class RowWriter:
    """Appends rows to an open file."""

    def __init__(self, handle: BinaryIO):
        self.handle, self.at, self.sha256 = handle, 0, hashlib.sha256()
        self._entries = bytearray()

    def put(self, data: bytes | memoryview) -> int:
        """Appends bytes; returns where they begin."""
        try:
            self.handle.write(data)
        except OSError as error:
            raise unwritable(error) from None
        self.sha256.update(data)
        self.at += len(data)
        return self.at - len(data)

    def add(self, rows: Sequence[Row], example: int, file: int) -> None:
        """Appends a row, or the pieces of one that was cut; they come from the example of this number of the file."""
        if rows[0].rejected is None:
            self._add(rows, example, file)
            return
        (row,), hashed = rows, rows[0].ids + rows[0].rejected.ids
        self._add([row], example, file, CHOSEN, hashed)
        self._add([row.rejected], example, file, REJECTED, hashed)

    def _add(
        self, rows: Sequence[Row], example: int, file: int, part: int = WHOLE, hashed: list[int] | None = None
    ) -> None:
        turns = json.dumps([[getattr(turn, name) for name in FIELDS] for turn in rows[0].turns], default=str).encode()
        turns_at, plain = self.put(turns), rows[0].turns[0].role == PLAIN
        for row in rows:
            ids, source = array("i", row.ids).tobytes(), row.source.encode(errors="surrogateescape")
            told = ids if hashed is None else array("i", hashed).tobytes()
            number = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
            weights = b"" if row.weights is None else np.array(row.weights, "<f8").tobytes()
            head = HEAD.pack(turns_at, len(turns), row.prompt_length)
            data = b"".join((head, ids, bytes(row.trained), weights, source))
            counts = len(data), len(row.ids), sum(row.trained), number
            self._entries += PACKED.pack(
                self.put(data), *counts, example, file, row.ended, plain, row.weights is not None, part
            )

    @property
    def index(self) -> np.ndarray:
        """Returns the entries of all rows; no row can be added while one uses it."""
        return np.frombuffer(self._entries, ENTRY)
