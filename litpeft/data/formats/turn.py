"""The turns of a chat: every format turns a row into a list of them."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str  # one of ROLES
    content: str
    train: bool | None = None  # an assistant's turn is trained unless this is False
    input: str = ""  # what an alpaca instruction is about; templates other than alpaca put it below the content

    @property
    def message(self) -> dict[str, str]:
        """Returns the turn as a chat template takes it."""
        return {"role": self.role, "content": self.content} | ({"input": self.input} if self.input else {})

    @property
    def trained(self) -> bool:
        return self.role == "assistant" and self.train is not False


def text(record: dict[str, Any], key: str, name: str, *, empty: bool = True) -> str:
    """Returns the string `record[key]`; raises a ValueError that calls it `name` if it is not a string."""
    if key not in record:
        raise ValueError(f"{name} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {'null' if value is None else type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{name} is empty")
    return value
