"""A chat of any number of turns; the bare list of messages is a row, too.

{"messages": [{"role": "system", "content": "Be brief."},
              {"role": "user", "content": "Capital of France?"},
              {"role": "assistant", "content": "Paris."},
              {"role": "user", "content": "And of Peru?"},
              {"role": "assistant", "content": "Lima.", "train": false}]}

Every turn of the assistant is trained, except where it says `"train": false`.
"""

from typing import Any

from litpeft.data.formats.turn import ROLES, Turn, text

# What a template would write out, so that leaving it away would teach another text.
UNSUPPORTED = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "weight")


def turns(record: Any) -> list[Turn]:
    """Returns the turns of a record; raises ValueError naming the key that is wrong."""
    if isinstance(record, dict):
        if "messages" not in record:
            raise ValueError("messages is missing")
        if record.get("tools"):
            raise ValueError("tools is not supported")
        record = record["messages"]
    if not isinstance(record, list):
        raise ValueError(f"messages must be a list, got {'null' if record is None else type(record).__name__}")
    if not record:
        raise ValueError("messages is empty")
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(record)]


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with role and content, got {type(message).__name__}")
    role = text(message, "role", f"{name}.role")
    if role not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {role!r}")
    for key in UNSUPPORTED:
        if message.get(key) is not None:
            raise ValueError(f"{name}.{key} is not supported")
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{name}.train must be true or false, got {train!r}")
    if train and role != "assistant":
        raise ValueError(f"{name}.train can be true for the assistant only, not for the {role}")
    trained = role == "assistant" and train is not False
    return Turn(role, text(message, "content", f"{name}.content", empty=not trained), train)
