"""One instruction, one answer.

{"instruction": "Name the capital.", "input": "France", "output": "Paris.", "system": "Be brief."}

`input` and `system` may be missing or empty.
"""

from typing import Any

from litpeft.data.formats.turn import Turn, text


def turns(record: Any) -> list[Turn]:
    """Returns the turns of a record; raises ValueError naming the key that is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"an alpaca row must be an object, got {type(record).__name__}")
    optional = {key: text(record, key, key) if record.get(key) is not None else "" for key in ("input", "system")}
    user = Turn("user", text(record, "instruction", "instruction", empty=False), input=optional["input"])
    answer = Turn("assistant", text(record, "output", "output", empty=False))
    return [*([Turn("system", optional["system"])] if optional["system"] else []), user, answer]
