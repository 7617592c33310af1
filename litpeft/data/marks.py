"""Private-use characters that stand in a chat while its template runs, to find places in the text that comes out."""

import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from litpeft.data.tokenizer_backends import Span

FIRST_PRIVATE = "\U000f0000"  # Unicode's private-use planes begin here


def texts(value: Any) -> Iterator[str]:
    """Yields every text in messages and tools, however deep, but the keys."""
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict | list | tuple):
            yield from texts(part)


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns the same with every text changed."""
    if isinstance(value, dict):
        return {key: changed(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [changed(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def unused(messages: Any, count: int) -> list[str]:
    """Returns private-use characters that no message holds."""
    held = {c for text in texts(messages) for c in text if c >= FIRST_PRIVATE}
    first = ord(FIRST_PRIVATE)
    return [chr(c) for c in range(first, first + count + len(held)) if chr(c) not in held][:count]


def shield(messages: Any, special: re.Pattern[str]) -> tuple[Any, dict[str, str]]:
    """Returns messages with a private-use character for each special token spelt in them, and the token of each.

    A special token in a message is plain text. After this, those in the template's output are the template's own.
    """
    words = sorted({word for text in texts(messages) for word in special.findall(text)})
    if not words:
        return messages, {}
    characters = dict(zip(words, unused(messages, len(words)), strict=True))
    shielded = changed(messages, lambda text: special.sub(lambda m: characters[m[0]], text))
    return shielded, {character: word for word, character in characters.items()}


def restore(text: str, spans: list[Span], words: dict[str, str]) -> tuple[str, list[Span], list[Span]]:
    """Undoes `shield` in a text: returns it with the words, the spans moved along, and where the words are."""
    if not words:
        return text, spans, []
    pieces, literal, moved, position, length = [], [], {}, 0, 0
    edges = {edge for span in spans for edge in span}
    for match in re.finditer(f"[{''.join(words)}]", text):
        moved |= {edge: edge - position + length for edge in edges if position <= edge <= match.start()}
        word = words[match[0]]
        pieces += [text[position : match.start()], word]
        start = length + match.start() - position
        literal.append((start, start + len(word)))
        position, length = match.end(), start + len(word)
    moved |= {edge: edge - position + length for edge in edges if position <= edge}
    return "".join([*pieces, text[position:]]), [(moved[a], moved[b]) for a, b in spans], literal


def marked(message: dict[str, str], begin: str, end: str, thoughts: str) -> dict[str, str]:
    """Returns the message with marks around what follows its `thoughts`, inside of spaces that a template may trim."""
    content = message["content"]
    core = content.rpartition(thoughts)[2].strip() if thoughts else content.strip()
    first = content.rindex(core) if core else len(content)
    return {**message, "content": f"{content[:first]}{begin}{core}{end}{content[first + len(core) :]}"}


def without_marks(text: str, marks: set[str]) -> tuple[str, dict[str, list[int]]]:
    """Returns the text without its marks, and for each mark where in that text it was."""
    places: dict[str, list[int]] = {}
    for count, match in enumerate(re.finditer(f"[{''.join(marks)}]", text)):
        places.setdefault(match[0], []).append(match.start() - count)
    return "".join(c for c in text if c not in marks) if places else text, places


def between(text: str, full: str, marks: tuple[str, ...], count: int) -> list[Span] | None:
    """Returns the spans of `full` that `text` has between pairs of marks; None unless there are `count` pairs."""
    parts = re.split(f"([{''.join(marks)}])", text)
    if parts[1::2] != list(marks) * count or "".join(parts[::2]) != full:
        return None
    ends = list(accumulate(map(len, parts[::2]), initial=0))
    return [(ends[2 * i + 1], ends[2 * i + 2]) for i in range(count)]
