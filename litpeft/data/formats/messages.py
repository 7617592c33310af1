"""A chat of any number of turns. The list of messages alone is a row, too.

{"messages": [{"role": "system", "content": "Be brief."},
              {"role": "user", "content": "Capital of France?"},
              {"role": "assistant", "content": "Paris."},
              {"role": "user", "content": "And of Peru?"},
              {"role": "assistant", "content": "Lima.", "train": false}]}

Every turn of the assistant is trained, except where it says `"train": false`, `"loss": false` or `"weight": 0`.
A system message may also stand beside the messages: {"system": "Be brief.", "messages": [...]}.
"""

from typing import Any

from litpeft.core.errors import quoted
from litpeft.data.formats import alpaca, keys
from litpeft.data.formats.turn import ROLES, Turn, text

MARKS = ("messages",)
KEYS = "a list of role and content"
EXAMPLE = '{"messages": [{"role": "...", "content": "..."}]}'
# a row with the keys of both formats would lose one of its texts
OTHER_SHAPE = dict.fromkeys(
    sorted({*alpaca.ASKED, "output"} - {"system"}), "the row has messages, which must hold the whole chat"
)


def turns(record: Any) -> list[Turn]:
    """Returns the turns of a record; raises ValueError naming the key that is wrong."""
    system = ""
    if isinstance(record, dict):
        if "messages" not in record:
            raise ValueError("messages is missing")
        keys.refuse(record, more=OTHER_SHAPE)
        keys.refuse_switched_off(record)
        system = text(record, "system", "system") if record.get("system") is not None else ""
        record = record["messages"]
    if not isinstance(record, list):
        raise ValueError(f"messages must be a list, got {'null' if record is None else type(record).__name__}")
    if not record:
        raise ValueError("messages is empty")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(record)]
    if not system or turns[0] == Turn("system", system):
        return turns
    if turns[0].role == "system":
        raise ValueError("system and messages[0] are two system messages: keep one of them")
    return [Turn("system", system), *turns]


def asked(record: Any) -> list[Turn]:
    """Returns the turns of a record to answer."""
    chat = turns(record)
    if chat[-1].role != "user":
        raise ValueError("the last message is not the user's: there is nothing to answer")
    return chat


def unread(record: Any, to_answer: bool = False) -> set[str]:
    """Returns the keys of a record, or of one to answer, that have no effect; those of a message as messages[].key."""
    found, messages = set(), record
    if isinstance(record, dict):
        found, messages = keys.unread(record, ("messages", "system", *OTHER_SHAPE), to_answer), record["messages"]
    return found | {f"messages[].{key}" for one in messages for key in keys.unread(one, ("role", "content"), to_answer)}


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with role and content, got {type(message).__name__}")
    role = text(message, "role", f"{name}.role")
    if role not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {quoted(role)}")
    keys.refuse(message, f"{name}.")
    train = keys.switch(message, f"{name}.")
    if train and role != "assistant":
        key = next(key for key in keys.SWITCHES if message.get(key) is not None)
        raise ValueError(f"{name}.{key} can be true for the assistant only, not for the {role}")
    trained = role == "assistant" and train is not False
    return Turn(role, text(message, "content", f"{name}.content", empty=not trained), train)
