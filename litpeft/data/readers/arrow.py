"""Parquet and Arrow files, read through pyarrow. Rows are counted from 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from litpeft.core.errors import DataError
from litpeft.core.extras import extra
from litpeft.data.readers.record import Record
from litpeft.data.readers.table import checked_names

BATCH = 1000  # rows that are turned into Python objects together


def read_parquet(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows of a Parquet file."""
    parquet = extra("pyarrow.parquet")
    with _readable(place, "Parquet"):
        file = parquet.ParquetFile(handle)
        yield from _rows(file.schema_arrow.names, file.iter_batches(BATCH), place)


def read_arrow(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows of an Arrow file, in its file format or, as the datasets library writes it, as a stream."""
    ipc = extra("pyarrow.ipc")
    with _readable(place, "Arrow"):
        is_file = handle.read(6) == b"ARROW1"
        handle.seek(0)
        if is_file:
            file = ipc.open_file(handle)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            file = batches = ipc.open_stream(handle)
        yield from _rows(file.schema.names, batches, place)


def _rows(names: list[str], batches: Iterator[Any], place: str) -> Iterator[Record]:
    checked_names(names, place)
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Record(f"{place}:{number}", row)


@contextmanager
def _readable(place: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (extra("pyarrow").ArrowException, OSError) as error:
        raise DataError(f"this is no {kind} file that pyarrow reads: {error}", where=place) from None
