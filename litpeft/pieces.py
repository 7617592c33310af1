"""A sentencepiece model file (tokenizer.model): its pieces, and the merges that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # what sentencepiece writes for a space
UNIGRAM, BPE_MODEL = 1, 2


@dataclass(frozen=True)
class PieceModel:
    """What a tokenizer.model holds."""

    pieces: list[tuple[str, int]]  # in the order of their ids: the text, and whether it is NORMAL, CONTROL, ...
    kind: int  # UNIGRAM, BPE_MODEL or another


def read_pieces(path: Path) -> PieceModel:
    """Returns what a tokenizer.model holds. Raises ValueError if it is not one."""
    pieces, kind = [], UNIGRAM
    for field, value in _fields(memoryview(path.read_bytes())):
        if field == 1 and isinstance(value, memoryview):  # ModelProto.pieces: piece = 1, score = 2, type = 3
            piece = dict(_fields(value))
            pieces.append((bytes(piece[1]).decode(), piece.get(3, NORMAL)))
        elif field == 2 and isinstance(value, memoryview):  # ModelProto.trainer_spec: model_type = 3
            kind = dict(_fields(value)).get(3, UNIGRAM)
    if not pieces or len(dict(pieces)) < len(pieces):
        raise ValueError("it holds no pieces, or one of them twice")
    return PieceModel(pieces, kind)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields number and value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError("it is no sentencepiece model")
        size, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Returns a number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is cut short")


def merges_of(order: list[str]) -> list[tuple[str, str]]:
    """Returns the merges that pieces stand for, best first: those that make the first piece of `order` come first."""
    known = set(order)
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
