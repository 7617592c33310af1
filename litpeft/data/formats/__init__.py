"""What a row of a data set may look like: one file a format, each with `turns(record) -> list[Turn]`."""

from collections.abc import Callable
from typing import Any

from litpeft.data.formats import alpaca, messages
from litpeft.data.formats.turn import Turn

FORMATS: dict[str, Callable[[Any], list[Turn]]] = {"alpaca": alpaca.turns, "messages": messages.turns}


def detect(record: Any) -> str:
    """Returns the name of the format that a row's keys show; raises ValueError if none does."""
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        return "messages"
    if isinstance(record, dict) and {"instruction", "output"} & record.keys():
        return "alpaca"
    seen = f"the keys {', '.join(map(repr, record)) or '(none)'}" if isinstance(record, dict) else type(record).__name__
    known = "alpaca (instruction, output, perhaps input, system) and messages (a list of role and content)"
    raise ValueError(f"the row has {seen}; known are {known}")
