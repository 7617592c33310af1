"""One instruction, one answer, and perhaps earlier turns.

{"instruction": "Name the capital.", "input": "France", "output": "Paris.", "system": "Be brief.",
 "history": [["Do you know capitals?", "Yes."]]}

`input`, `system` and `history` may be missing or empty; `context` is another name of `input`.
Every answer is trained, those of the history too.
"""

from typing import Any

from litpeft.data.formats import keys
from litpeft.data.formats.turn import Turn, text

MARKS = ("instruction", "output")
KEYS = "instruction, output, perhaps input, system"
EXAMPLE = '{"instruction": "...", "input": "...", "output": "..."}'
ASKED = ("instruction", "input", "context", "system", "history")


def turns(record: Any) -> list[Turn]:
    """Returns the turns of a record; raises ValueError naming the key that is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"an alpaca row must be an object, got {type(record).__name__}")
    keys.refuse_switched_off(record)
    return [*asked(record), Turn("assistant", text(record, "output", "output", empty=False))]


def unread(record: dict[str, Any], to_answer: bool = False) -> set[str]:
    """Returns the keys of a record, or of one to answer, that have no effect."""
    return keys.unread(record, (*ASKED, "prompt" if to_answer else "output"), to_answer)


def asked(record: dict[str, Any], instruction: str = "instruction") -> list[Turn]:
    """Returns the turns before the answer; `instruction` is the key of the question."""
    keys.refuse(record)
    user = text(record, instruction, instruction, empty=False)
    about = {key: _optional(record, key) for key in ("input", "context")}
    if all(about.values()):
        raise ValueError("input and context mean the same: keep one of them")
    system = _optional(record, "system")
    turns = [Turn("system", system)] if system else []
    return [*turns, *_history(record.get("history")), Turn("user", user, input=about["input"] or about["context"])]


def _optional(record: dict[str, Any], key: str) -> str:
    return text(record, key, key) if record.get(key) is not None else ""


def _history(history: Any) -> list[Turn]:
    """Returns the turns of earlier pairs of question and answer."""
    turns = []
    if not isinstance(history, list | None):
        raise ValueError(f"history must be a list of [question, answer], got {type(history).__name__}")
    for number, pair in enumerate(history or []):
        place = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{place} must be [question, answer]")
        said = dict(enumerate(pair))
        turns.append(Turn("user", text(said, 0, f"{place}[0]")))
        turns.append(Turn("assistant", text(said, 1, f"{place}[1]", empty=False)))
    return turns
