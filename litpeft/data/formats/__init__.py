"""The formats of a row, one file each: `turns(record) -> list[Turn]`, and `unread(record)`, the keys without effect."""

from collections.abc import Callable
from typing import Any

from litpeft.core.errors import quoted, some
from litpeft.data.formats import alpaca, messages
from litpeft.data.formats.turn import Turn

FORMATS: dict[str, Callable[[Any], list[Turn]]] = {"alpaca": alpaca.turns, "messages": messages.turns}
UNREAD: dict[str, Callable[[Any], set[str]]] = {"alpaca": alpaca.unread, "messages": messages.unread}
SHAPES = '{"instruction": "...", "input": "...", "output": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


def detect(record: Any) -> str:
    """Returns the format of a row by its keys; raises ValueError if they fit none."""
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        return "messages"
    if isinstance(record, dict) and {"instruction", "output"} & record.keys():
        return "alpaca"
    seen = type(record).__name__
    if isinstance(record, dict):
        seen = f"the keys {some([quoted(key) for key in record]) or '(none)'}"
    known = "alpaca (instruction, output, perhaps input, system) and messages (a list of role and content)"
    raise ValueError(f"the row has {seen}; known are {known}")
