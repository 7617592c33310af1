"""What a reader yields."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """A row as it was read, or why it cannot be used."""

    where: str  # file:line; of a table without lines file:row, of a workbook file:sheet:row
    value: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row that is left out, for rejected.jsonl."""

    where: str  # file:line
    reason: str
