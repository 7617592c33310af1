"""The formats of a row. One is a file here and an entry of FORMATS.

It has MARKS, the keys by which its rows are known, of which a row to answer has the first; KEYS, in words, and EXAMPLE,
a row, for messages; `turns(record)`; `asked(record)`, the turns of a row to answer; `unread(record, to_answer)`, the
keys without effect. For a wrong row `turns` and `asked` raise a ValueError that names the key.
"""

from types import ModuleType
from typing import Any

from litpeft.core.errors import quoted, some
from litpeft.data.formats import alpaca, messages

# in the order in which they are tried
FORMATS: dict[str, ModuleType] = {"messages": messages, "alpaca": alpaca}
QUESTIONS: dict[str, ModuleType] = {one.MARKS[0]: one for one in FORMATS.values()}
EXAMPLES = " or ".join(one.EXAMPLE for one in FORMATS.values())


def detect(record: Any) -> str:
    """Returns the format of a row by its keys; raises ValueError if they fit none."""
    if isinstance(record, list):
        return "messages"
    seen = type(record).__name__
    if isinstance(record, dict):
        for name, one in FORMATS.items():
            if any(mark in record for mark in one.MARKS):
                return name
        seen = f"the keys {some([quoted(key) for key in record]) or '(none)'}"
    known = ", ".join(f"{name} ({one.KEYS})" for name, one in FORMATS.items())
    raise ValueError(f"the row has {seen}; known are {known}")
