"""The bytes of a file of rows, or of standard input, unpacked."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from litpeft.core.errors import DataError, located
from litpeft.core.extras import extra

STDIN = "-"  # as the path of a file
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "parquet", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGIC |= {b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def unzstd(packed: BinaryIO) -> BinaryIO:
    """Returns the content of a Zstandard file, which may have several frames; raises EOFError if it is cut off."""
    zstandard, data, parts = extra("zstandard"), packed.read(), []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if not frame.eof:  # the library's own stream would end here without a word
            raise EOFError("it ends too early")
        data = frame.unused_data
    return BytesIO(b"".join(parts))


Unpack = Callable[[BinaryIO], BinaryIO]
PACKINGS: dict[str, Unpack] = {".gz": gzip.open, ".zst": unzstd, ".xz": lzma.open, ".bz2": bz2.open}


@contextmanager
def opened(path: Path, packing: str = "", name: str = "") -> Iterator[BinaryIO]:
    """Opens a file for reading; what goes wrong with it within the block is a DataError that names it."""
    name = name or shown(path)
    try:
        with located(name), BytesIO(_stdin()) if str(path) == STDIN else open(path, "rb") as handle:
            yield PACKINGS[packing](handle) if packing else handle
    except DAMAGED as error:
        raise DataError(f"the packed file is damaged: {error}", where=name, hint="fetch or pack it anew") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from None


@cache
def _stdin() -> bytes:
    """Returns all of standard input, which can be read only once."""
    return sys.stdin.buffer.read()


def shown(path: Path | str) -> str:
    """Returns a path as messages name it."""
    return "standard input" if str(path) == STDIN else str(path)


def first_bytes(path: Path) -> bytes:
    """Returns how standard input begins, behind spaces."""
    return _stdin().removeprefix(BOM).lstrip()[:1]


def not_utf8(error: UnicodeDecodeError, line: int = 0) -> str:
    """Returns what is wrong with a text in another encoding than UTF-8, and what its byte is in Windows' own."""
    place = f"byte {error.start + 1}" + (f" of line {line}" if line else "")
    letter = error.object[error.start : error.start + 1].decode("cp1252", errors="replace")
    return f"not UTF-8 at {place}, where Windows-1252 has {letter!r}: save the file as UTF-8"


def refuse_binary(handle: BinaryIO, place: str, kind: str) -> None:
    """Raises DataError if a file of text begins like something else; leaves it at its beginning, or past a BOM."""
    head = handle.read(6)
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            packed = {"gzip": ".gz", "Zstandard": ".zst", "xz": ".xz", "bzip2": ".bz2"}.get(found)
            hint = f"give it a name that ends in {packed}" if packed else "unpack or convert it to UTF-8 text"
            raise DataError(f"the file is {found}, not {kind} in UTF-8", where=place, hint=hint)
    handle.seek(len(BOM) if head.startswith(BOM) else 0)
