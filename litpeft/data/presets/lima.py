"""LIMA: 1,030 chosen questions and answers, 30 of them chats of several turns. https://arxiv.org/abs/2305.11206

A row lists texts of the user and the assistant in turn. The repository is gated: accept its terms, set HF_TOKEN.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from litpeft.data.presets.preset import Preset
from litpeft.data.readers.record import Record

ROLES = ("user", "assistant")


def rows(records: Iterator[Record]) -> Iterator[Record]:
    """Yields the rows with messages in place of texts."""
    for record in records:
        said = record.value.get("conversations") if isinstance(record.value, dict) else None
        if record.problem or not isinstance(said, list) or not all(isinstance(text, str) for text in said):
            yield record
            continue
        yield replace(
            record,
            value={key: value for key, value in record.value.items() if key != "conversations"}
            | {"messages": messages(said)},
        )


def messages(texts: list[str]) -> list[dict[str, Any]]:
    """Returns texts of the user and the assistant in turn as messages."""
    return [{"role": ROLES[at % 2], "content": text} for at, text in enumerate(texts)]


PRESET = Preset(
    source="hf://GAIR/lima",
    licence="CC BY-NC-SA, or that of a text's source where it is stricter; gated",
    about="1,030 questions with well-written answers, 30 of them chats",
    row={"conversations": ["...", "..."], "source": "stackexchange"},
    rows=rows,
    train="train.jsonl",
)
