"""Rows that hold a list of messages, whatever its keys are called; messages.py and sharegpt.py name them."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from litpeft.core.errors import quoted
from litpeft.data.formats import keys
from litpeft.data.formats.turn import ROLES, Turn, optional, text

# a row with the keys of a pair, too, would lose one of its texts
OTHER_SHAPE = dict.fromkeys(
    ("context", "history", "input", "instruction", "output"), "the row has messages, which must hold the whole chat"
)
OF_TOOLS = ("tool_calls", "tool_call_id")
CALL = "function_call"  # a role of ShareGPT's: the assistant, whose text is a call
SHARED_ROLES = {"human": "user", "gpt": "assistant", "system": "system", CALL: "assistant", "observation": "tool"}
SHARED_ROLES |= {"user": "user", "assistant": "assistant", "tool": "tool", "function_response": "tool"}
SHARED_ROLES |= dict.fromkeys(("chatgpt", "bing", "bard", "model"), "assistant")  # of chats with other services


@dataclass(frozen=True)
class Chat:
    """A format of rows that have a list of messages."""

    key: str  # of the list of messages
    role: str
    content: str
    roles: dict[str, str] = field(default_factory=lambda: {role: role for role in ROLES})  # name in the rows -> ours
    note: str = ""

    @property
    def example(self) -> dict[str, Any]:
        return {self.key: [{self.role: name, self.content: "..."} for name in self._names("user", "assistant")]}

    def fits(self, record: Any) -> bool:
        """Returns whether a row has all that the format needs."""
        return self.key in record

    resembles = fits

    def turns(self, record: Any) -> list[Turn]:
        """Returns the turns of a record; raises ValueError naming the key that is wrong."""
        if isinstance(record, list):
            return self.listed(record, self.key)
        if not isinstance(record, dict) or self.key not in record:
            raise ValueError(f"{self.key} is missing")
        keys.refuse(record, more=OTHER_SHAPE, known=("tools", *keys.TOLD))
        system, tools = optional(record, "system"), _tools(record.get("tools"))
        turns = self.listed(self._messages(record), self.key)
        if system and turns[0].role in ("system", "developer") and turns[0].content != system:
            raise ValueError(f"system and {self.key}[0] are two system messages: keep one of them")
        if system and turns[0].role not in ("system", "developer"):
            turns = [Turn("system", system), *turns]
        return keys.weighted([replace(turns[0], tools=tools, told=keys.told(record)), *turns[1:]], record)

    def asked(self, record: Any) -> list[Turn]:
        """Returns the turns of a record to answer."""
        chat = self.turns(record)
        if chat[-1].role not in ("user", "tool"):
            raise ValueError("the last message is not the user's: there is nothing to answer")
        return chat

    def unread(self, record: Any, to_answer: bool = False) -> set[str]:
        """Returns the keys of a record, or one to answer, that have no effect; those of a message as messages[].key."""
        found, messages = set(), record
        if isinstance(record, dict):
            known = (self.key, "system", "tools", *OTHER_SHAPE)
            found, messages = keys.unread(record, known, to_answer), self._messages(record)
        chat = self._named(messages)
        for one in messages:
            known = (chat.role, chat.content, *(("name",) if chat.roles[one[chat.role]] == "tool" else ()))
            found |= {f"{self.key}[].{key}" for key in keys.unread(one, known, to_answer)}
        return found

    def listed(self, messages: Any, name: str) -> list[Turn]:
        """Returns the turns of a list of messages; errors call it `name`."""
        if not isinstance(messages, list):
            raise ValueError(f"{name} must be a list, got {'null' if messages is None else type(messages).__name__}")
        if not messages:
            raise ValueError(f"{name} is empty: there are no messages")
        chat = self._named(messages)
        return [chat._turn(message, f"{name}[{i}]") for i, message in enumerate(messages)]

    def _named(self, messages: list[Any]) -> "Chat":
        """Returns the format with the keys that the messages have: `conversations` may hold role and content, too."""
        first = messages[0] if isinstance(messages[0], dict) else {}
        other = ("role", "content", {name: name for name in ROLES}), ("from", "value", SHARED_ROLES)
        fitting = (names for names in other if self.role not in first and names[0] in first and names[1] in first)
        names = next(fitting, None)
        return self if names is None else replace(self, role=names[0], content=names[1], roles=names[2])

    def _messages(self, record: dict[str, Any]) -> Any:
        """Returns the list of messages, which a cell of a table holds as JSON."""
        value = record[self.key]
        return _json(value, self.key) if isinstance(value, str) else value

    def _turn(self, message: Any, name: str) -> Turn:
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise ValueError(f"{name} must be an object with {self.role} and {self.content}, got {kind}")
        said = text(message, self.role, f"{name}.{self.role}")
        if said not in self.roles:
            raise ValueError(f"{name}.{self.role} must be one of {', '.join(self.roles)}, got {quoted(said)}")
        keys.refuse(message, f"{name}.", known=(*OF_TOOLS, *(keys.THINKING if self.roles[said] == "assistant" else ())))
        role, weight = self.roles[said], keys.switch(message, f"{name}.")
        train = None if weight is None else weight > 0
        if train and role != "assistant":
            key = next(key for key in keys.SWITCHES if message.get(key) not in keys.NOTHING)
            on = "above 0" if key == "weight" else "true"
            raise ValueError(f"{name}.{key} can be {on} for the assistant only, not for the {said}")
        calls = _calls(message.get("tool_calls"), f"{name}.tool_calls", role)
        trained = role == "assistant" and train is not False and not calls
        content = _content(message, self.content, f"{name}.{self.content}", trained, bool(calls))
        if said == CALL:
            calls, content = (_call(_json(content, f"{name}.{self.content}"), f"{name}.{self.content}"),), ""
        of_tool = ("name", "tool_call_id") if role == "tool" else ()
        more = tuple((key, text(message, key, f"{name}.{key}")) for key in of_tool if message.get(key) is not None)
        if message.get("tool_call_id") and role != "tool":
            raise ValueError(f"{name}.tool_call_id belongs to a message of the role tool, not of {said}")
        thinking = keys.thoughts(message, content, f"{name}.")
        return Turn(role, content, train, calls=calls, more=more, thinking=thinking, weight=weight or 1.0)

    def _names(self, *roles: str) -> list[str]:
        """Returns what the rows call these roles."""
        return [next(name for name, ours in self.roles.items() if ours == role) for role in roles]


def _content(message: dict[str, Any], key: str, name: str, trained: bool, missing: bool) -> str:
    """Returns the text of a message, whose parts are put together; with `missing` it may be null."""
    parts = message.get(key)
    if isinstance(parts, list):
        for at, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise ValueError(f"{name}[{at}] must be a part of the type text, got {quoted(kind)}")
        message = {key: "".join(text(part, "text", f"{name}[{at}].text") for at, part in enumerate(parts))}
    return "" if missing and parts is None else text(message, key, name, empty=not trained)


def _tools(tools: Any) -> tuple[Any, ...]:
    """Returns the tools of a row, which may be a list or the JSON of one."""
    tools = _json(tools, "tools") if isinstance(tools, str) and tools else tools
    if tools in keys.NOTHING:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools must be a list of objects, got {quoted(tools)}")
    return tuple(tools)


def _calls(calls: Any, name: str, role: str) -> tuple[Any, ...]:
    if calls in keys.NOTHING:
        return ()
    if role != "assistant" or not isinstance(calls, list):
        raise ValueError(f"{name} must be a list, in a message of the assistant")
    return tuple(_call(call, f"{name}[{at}]") for at, call in enumerate(calls))


def _call(call: Any, name: str) -> dict[str, Any]:
    """Returns a call as chat templates expect it: its arguments are an object, in OpenAI's rows the JSON of one."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise ValueError(f"{name} must be a call with name and arguments, got {quoted(call)}")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{name}.arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}.arguments must be an object, got {quoted(arguments)}")
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON: {error}") from None
