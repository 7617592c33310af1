"""What the assistant thought before an answer: in a row, in a message for a template, in the text that comes out."""

import re
from collections.abc import Mapping
from typing import Any

from litpeft.data.formats.turn import Turn

BEGIN, END = "<think>", "</think>"
BLOCK = re.compile(rf"\s*(?:{BEGIN})?(.*?){END}\s*(.*)", re.DOTALL)  # some prompts end with the tag that begins it
MESSAGE_KEYS = ("reasoning_content", "reasoning", "thinking")  # what templates call it


def parted(content: str) -> tuple[str, str]:
    """Returns the thoughts and the answer in the text of a message; without thoughts, "" and the text as it is."""
    match = BLOCK.fullmatch(content) if END in content else None
    return (match[1].strip(), match[2]) if match else ("", content)


def closed(text: str) -> str:
    """Returns an answer that was cut within its thoughts with those at their end, and nothing said after them."""
    return f"{text}\n{END}\n\n" if text.lstrip().startswith(BEGIN) and END not in text else text


def thoughts_of(turn: Turn) -> str:
    """Returns what the assistant thought before it said this."""
    return (turn.thinking.strip() or parted(turn.content)[0]) if turn.role == "assistant" else ""


def answer_of(turn: Turn) -> str:
    """Returns what the assistant said, without what it thought before."""
    return parted(turn.content)[1] if turn.role == "assistant" else turn.content


def with_thoughts(message: dict[str, Any], turn: Turn, key: str | None) -> dict[str, Any]:
    """Returns a message of the assistant with its thoughts under the key that the template reads, or in its content."""
    if not (thoughts := thoughts_of(turn)):
        return message
    if key is not None:
        return message | {key: thoughts, "content": answer_of(turn)}
    return message if not turn.thinking else message | {"content": block(thoughts, turn.content)}


def block(thoughts: str, answer: str) -> str:
    """Returns thoughts and answer as one text."""
    return f"{BEGIN}\n{thoughts}\n{END}\n\n{answer}"


def split_message(message: Mapping[str, Any], key: str | None) -> tuple[str, dict[str, Any]]:
    """Returns what `with_thoughts` wrote into a message, and the message without it."""
    if key is not None:
        bare = {name: value for name, value in message.items() if name != key}
        return message.get(key, ""), bare
    thoughts, answer = parted(message["content"])
    return thoughts, {**message, "content": answer}


def after_prompt(prompt: str, thoughts: str, answer: str) -> str:
    """Returns what the model writes after a prompt, which may have begun the thoughts already.

    Raises ValueError if the prompt says that nothing is thought.
    """
    ends = prompt.rstrip()
    if ends.endswith(END):
        raise ValueError("the row has thoughts, and the prompt for its answer ends with an empty block of them")
    if not ends.endswith(BEGIN):
        return block(thoughts, answer)
    return block(thoughts, answer).removeprefix(BEGIN if prompt == ends else f"{BEGIN}\n")
