"""What a preset says of a data set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from litpeft.data.readers.record import Record


def as_they_are(records: Iterator[Record]) -> Iterator[Record]:
    """Yields the rows unchanged."""
    return records


@dataclass(frozen=True)
class Preset:
    """A well-known data set of the hub."""

    source: str  # hf://ORG/NAME, perhaps with a configuration
    licence: str  # of the rows
    about: str  # one line
    row: dict[str, Any]  # a row's shape
    columns: dict[str, str] | None = None  # as data.columns, for rows whose keys no format has
    rows: Callable[[Iterator[Record]], Iterator[Record]] = as_they_are  # for rows whose shape no format has
    train: str = ""  # split, file or glob of the rows to train on, where it is not called train
    held_out: str = ""  # split of held-out rows, where it is not called validation
