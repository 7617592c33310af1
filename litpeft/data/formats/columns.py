"""Rows with columns of one's own, mapped by a setting: {"user": "question", "assistant": "{answer}, says {author}"}.

A value is the name of a column, or a text with names of columns in braces. `messages` maps a list of messages, with
`role` and `content` inside it or, as in ShareGPT's, `from` and `value`; `text` a document. `weight` maps the column
of a row's weight in the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from litpeft.core.errors import quoted, some
from litpeft.data.formats import keys, sharegpt
from litpeft.data.formats.chat import Chat
from litpeft.data.formats.document import Document
from litpeft.data.formats.turn import Turn

PARTS = ("system", "user", "input", "thinking", "assistant", "weight")
SHAPES = (("messages",), ("messages", "system"), ("text",))


def mapped(columns: Mapping[str, str], option: str = "columns") -> "Columns":
    """Returns the format that a setting describes; raises ValueError, which calls it `option`, if it is wrong."""
    wrong = [key for key in columns if key not in (*PARTS, "messages", "text")]
    if wrong:
        raise ValueError(f"{option} maps {', '.join((*PARTS, 'messages', 'text'))}; got {quoted(wrong[0])}")
    if "user" not in columns and tuple(sorted({*columns} - {"weight"})) not in SHAPES:
        got = some(list(columns)) or "nothing"
        raise ValueError(f"{option} needs user and assistant, or messages, or text; got {got}")
    if "user" in columns and {"messages", "text"} & set(columns):
        raise ValueError(f"{option} has {some(list(columns))}: a row is a question and an answer, messages, or a text")
    for part, value in columns.items():
        try:
            names = list(Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{option}.{part}: {quoted(value)} is no text with columns in braces: {error}") from None
        if not value or any(name == "" or spec or conversion for _, name, spec, conversion in names):
            raise ValueError(f"{option}.{part} must be a column, or a text with {{column}} in it, got {quoted(value)}")
    return Columns(tuple(columns.items()))


@dataclass(frozen=True)
class Columns:
    """The format of rows that are mapped by a setting."""

    parts: tuple[tuple[str, str], ...]
    note: str = ""

    def fits(self, record: Any, to_answer: bool = False) -> bool:
        """Returns whether a row, or one to answer, has the columns that are mapped."""
        if not isinstance(record, dict):
            return False
        needed = (value for part, value in self.parts if part not in ("assistant", "weight") or not to_answer)
        return all(name in record for value in needed for name in _names(record, value))

    def turns(self, record: Any) -> list[Turn]:
        """Returns the turns of a record; raises ValueError naming the column that is wrong."""
        if not {part for part, _ in self.parts} & {"assistant", "messages", "text"}:
            raise ValueError("no column is mapped to assistant: there is nothing to learn")
        turns = self._read(record, "turns")
        return keys.weighted(turns, {"weight": self._weight(record)})

    def asked(self, record: Any) -> list[Turn]:
        """Returns the turns of a record to answer."""
        return self._read(record, "asked")

    def unread(self, record: dict[str, Any], to_answer: bool = False) -> set[str]:
        """Returns the columns of a record that are not mapped."""
        return {key for key in record if key not in self._used(record) and key not in keys.REFUSED}

    def _read(self, record: Any, method: str) -> list[Turn]:
        if not isinstance(record, dict):
            raise ValueError(f"a row must be an object, got {type(record).__name__}")
        keys.refuse({key: value for key, value in record.items() if key not in self._used(record)})
        parts = {part: value for part, value in self.parts if part != "weight"}
        if "text" in parts:
            return getattr(Document("text"), method)({"text": self._value(record, "text", parts["text"])})
        if "messages" in parts:
            column = parts["messages"]
            said = record.get(column)
            shared = isinstance(said, list) and said and isinstance(said[0], dict) and "from" in said[0]
            names = ("from", "value", sharegpt.FORMAT.roles) if shared else ("role", "content")
            more = {"system": self._value(record, "system", parts["system"])} if "system" in parts else {}
            return getattr(Chat(column, *names), method)({column: said} | more)
        if method == "asked":
            parts = {part: value for part, value in parts.items() if part not in ("assistant", "thinking")}
        said = {part: self._value(record, part, value) for part, value in parts.items()}
        system = [Turn("system", said["system"])] if said.get("system") else []
        chat = [*system, Turn("user", said["user"], input=said.get("input", ""))]
        if method == "asked":
            return chat
        thinking = keys.thoughts({"thinking": said.get("thinking", "")}, said["assistant"])
        return [*chat, Turn("assistant", said["assistant"], thinking=thinking)]

    def _weight(self, record: dict[str, Any]) -> float | None:
        """Returns the weight of a row in the loss, None if it has none; raises ValueError if the cell holds another."""
        value = dict(self.parts).get("weight")
        said = self._value(record, "weight", value) if value else ""
        if said and keys.weight_of(said) is None:
            raise ValueError(f"{value} must be {keys.ALLOWED}, got {quoted(said)}")
        return keys.weight_of(said)

    def _used(self, record: dict[str, Any]) -> set[str]:
        """Returns the columns that the parts name."""
        return {name for _, value in self.parts for name in _names(record, value)}

    def _value(self, record: dict[str, Any], part: str, value: str) -> str:
        said = {name: _cell(record, name, part) for name in _names(record, value)}
        if value in said:
            return said[value]
        return "".join(before + ("" if name is None else said[name]) for before, name, _, _ in Formatter().parse(value))


def _names(record: dict[str, Any], value: str) -> list[str]:
    """Returns the columns in a part: the one of that name, or those in braces."""
    inside = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
    return [value] if value in record or not inside else inside


def _cell(record: dict[str, Any], name: str, part: str) -> str:
    value = record.get(name)
    if name not in record:
        raise ValueError(f"the column {quoted(name)} is missing; the row has {some([quoted(key) for key in record])}")
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"{name} must be a text or a number, got {type(value).__name__}")
    text = "" if value is None else str(value)
    if part in ("user", "assistant", "text") and not text.strip():
        raise ValueError(f"{name} is empty" + (": nothing is asked" if part == "user" else ""))
    return text
