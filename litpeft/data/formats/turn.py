"""The turns of a chat: every format turns a row into a list of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN = "text"  # the role of a document, which is trained whole and without a chat template


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat, or a document."""

    role: str  # one of ROLES, or PLAIN
    content: str
    train: bool | None = None  # an assistant's turn is trained unless this is False
    input: str = ""  # what an alpaca instruction is about; templates other than alpaca put it below the content
    calls: tuple[Any, ...] = ()  # of tools: {"type": "function", "function": {"name": ..., "arguments": {...}}}
    more: tuple[tuple[str, str], ...] = ()  # what else a template gets: name and tool_call_id of a tool's message
    tools: tuple[Any, ...] = ()  # that the chat may call; they stand on its first turn
    told: tuple[tuple[str, Any], ...] = ()  # what the row tells the template, on its first turn: enable_thinking, ...
    thinking: str = ""  # what the assistant thought before its answer, where a key of the row holds it
    weight: float = 1.0  # of its tokens in the loss, if they are trained

    @property
    def message(self) -> dict[str, Any]:
        """Returns the turn as a chat template takes it."""
        message = {"role": self.role, "content": self.content} | ({"input": self.input} if self.input else {})
        return message | dict(self.more) | ({"tool_calls": list(self.calls)} if self.calls else {})

    @property
    def trained(self) -> bool:
        return self.role in ("assistant", PLAIN) and self.train is not False


def text(record: Mapping[Any, Any], key: Any, name: str, *, empty: bool = True) -> str:
    """Returns the string `record[key]`; raises a ValueError that calls it `name` if it is not a string."""
    if key not in record:
        raise ValueError(f"{name} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {'null' if value is None else type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def optional(record: Mapping[str, Any], key: str) -> str:
    """Returns the string `record[key]`, an empty one if there is none."""
    return text(record, key, key) if record.get(key) is not None else ""


def unknown_call(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the name of a call that none of the tools has; None if all calls are of one of them."""
    known = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    names = [tool.get("name") for tool in known]
    called = (call["function"]["name"] for turn in turns for call in turn.calls)
    return next((name for name in called if name not in names), None)
