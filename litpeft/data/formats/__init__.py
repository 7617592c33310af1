"""The formats of a row. One is a file here with its FORMAT, and an entry of FORMATS.

A format has `key`, by which a row to answer is known; `example`, a row, for messages; `note`, which the log adds to its
name; `fits(record)` and `resembles(record)`, by which a row to learn is known; `turns(record)`; `asked(record)`, the
turns of a row to answer; `unread(record, to_answer)`, the keys without effect. For a wrong row `turns` and `asked`
raise a ValueError that names the key.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from litpeft.core.errors import quoted, some
from litpeft.data.formats import (
    alpaca,
    document,
    messages,
    preference,
    prompt_completion,
    question_answer,
    sharegpt,
)
from litpeft.data.formats.columns import mapped
from litpeft.data.formats.pair import Pair
from litpeft.data.formats.turn import Turn


class Format(Protocol):
    """What a format can do."""

    key: str
    example: dict[str, Any]
    note: str

    def fits(self, record: Any) -> bool: ...
    def resembles(self, record: Any) -> bool: ...
    def turns(self, record: Any) -> list[Turn]: ...
    def asked(self, record: Any) -> list[Turn]: ...
    def unread(self, record: Any, to_answer: bool = False) -> set[str]: ...


# in the order in which they are tried
FORMATS: dict[str, Format] = {
    "preference": preference.FORMAT,
    "messages": messages.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "alpaca": alpaca.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
    "question_answer": question_answer.FORMAT,
    "text": document.FORMAT,
}
MAPPED = "columns"  # the name of the format that a setting describes
EXAMPLES = " or ".join(json.dumps(FORMATS[name].example) for name in ("messages", "alpaca"))
QUESTIONS = {one.key: name for name, one in FORMATS.items() if name not in ("preference", "text")}
Choose = Callable[[Any], tuple[str, Format]]  # returns the format of a row, and its name


def chosen(name: str, columns: Mapping[str, str] | None, to_answer: bool = False) -> Choose:
    """Returns what chooses the format of each row: `name` if it is not auto, or that of a mapping of columns."""
    if columns:
        own = MAPPED, mapped(columns)
        return lambda record: own
    if name != "auto":
        set_by_name = name, FORMATS[name]
        return lambda record: set_by_name

    def seen(record: Any) -> tuple[str, Format]:
        found = detect_question(record) if to_answer else detect(record)
        return found, FORMATS[found]

    return seen


def detect(record: Any) -> str:
    """Returns the format of a row by its keys; raises ValueError if they fit none, or several."""
    if isinstance(record, list):
        if record and isinstance(record[0], dict) and not {"role", "from"} & record[0].keys():
            raise ValueError("the line is a list of rows: give the file a name that ends in .json, or each row a line")
        return "messages"
    if not isinstance(record, dict):
        raise _unknown(record)
    fitting = [name for name, one in FORMATS.items() if one.fits(record)]
    pairs = [name for name in fitting if isinstance(FORMATS[name], Pair)]
    if len(pairs) > 1 and fitting[0] == pairs[0] != "preference":
        raise ValueError(f"the row has the keys of {' and '.join(pairs)}: say which format it is, or map its columns")
    similar = fitting or [name for name, one in FORMATS.items() if one.resembles(record)]
    if not similar or (len(similar) > 1 and not fitting):
        raise _unknown(record)
    return similar[0]


def detect_question(record: Any) -> str:
    """Returns the format of a row to answer."""
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object, got {type(record).__name__}")
    found = [key for key in QUESTIONS if key in record]
    if len(found) != 1:
        got = some([quoted(key) for key in record]) or "no key"
        raise ValueError(f"a row has one of {', '.join(QUESTIONS)}; this one has {got}")
    return QUESTIONS[found[0]]


def _unknown(record: Any) -> ValueError:
    seen = type(record).__name__
    if isinstance(record, dict):
        seen = f"the keys {some([quoted(key) for key in record]) or '(none)'}"
    return ValueError(f"the row has {seen}; known formats are {', '.join(FORMATS)}")
