"""Rows of one question and one answer, whatever the keys are called; alpaca.py and its like name them.

`reasoning` (or `thinking`, `thoughts`, `reasoning_content`) holds what was thought before the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from litpeft.data.formats import keys
from litpeft.data.formats.chat import Chat
from litpeft.data.formats.turn import Turn, optional, text

ANSWERS = ("output", "completion", "answer", "response")  # any of these may hold the answer
BESIDE = ("input", "context", "system", "history")  # may be missing or empty
LIST = Chat("messages", "role", "content")  # reads a question or an answer that is a list of messages


@dataclass(frozen=True)
class Pair:
    """A format of rows that have a question and an answer."""

    key: str  # of the question
    answers: tuple[str, ...]  # the format's own first
    needed: tuple[str, ...] = ()  # other keys without which a row is not of this format
    note: str = ""  # what the log adds to the name

    @property
    def example(self) -> dict[str, Any]:
        return dict.fromkeys((self.key, self.answers[0], *self.needed), "...")

    def fits(self, record: dict[str, Any]) -> bool:
        """Returns whether a row has all that the format needs."""
        has = record.__contains__
        return self.key in record and all(map(has, self.needed)) and any(map(has, self.answers))

    def resembles(self, record: dict[str, Any]) -> bool:
        """Returns whether a row seems to be of this format, though something is missing."""
        return self.key in record or self.answers[0] in record

    def turns(self, record: Any) -> list[Turn]:
        """Returns the turns of a record; raises ValueError naming the key that is wrong."""
        if not isinstance(record, dict):
            raise ValueError(f"a row must be an object, got {type(record).__name__}")
        given = [key for key in self.answers if record.get(key) not in keys.NOTHING]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} could both be the answer: keep one of them")
        before, answer = self.asked(record), next((k for k in (*given, *self.answers) if k in record), self.answers[0])
        if isinstance(record.get(answer), list):
            keys.refuse({key: record[key] for key in keys.THINKING if key in record})
            return keys.weighted(_joined(before, LIST.listed(record[answer], answer)), record)
        said = text(record, answer, answer, empty=False)
        return keys.weighted([*before, Turn("assistant", said, thinking=keys.thoughts(record, said))], record)

    def asked(self, record: Any) -> list[Turn]:
        """Returns the turns before the answer."""
        keys.refuse(record, known=(*self.answers, *self.needed, *keys.THINKING, *keys.TOLD))
        system = optional(record, "system")
        opening = [Turn("system", system)] if system else []
        about = {key: optional(record, key) for key in ("input", "context")}
        if all(about.values()):
            raise ValueError("input and context mean the same: keep one of them")
        if isinstance(record.get(self.key), list):
            if any(record.get(key) not in keys.NOTHING for key in BESIDE):
                raise ValueError(f"{self.key} is a list of messages, which must hold the whole chat")
            said = LIST.listed(record[self.key], self.key)
            first, *rest = (replace(turn, train=False) if turn.trained else turn for turn in said)
            return [replace(first, told=keys.told(record)), *rest]
        asked = text(record, self.key, self.key)
        if not asked.strip():
            raise ValueError(f"{self.key} is empty: nothing is asked")
        user = Turn("user", asked, input=about["input"] or about["context"])
        first, *rest = [*opening, *_history(record.get("history")), user]
        return [replace(first, told=keys.told(record)), *rest]

    def unread(self, record: dict[str, Any], to_answer: bool = False) -> set[str]:
        """Returns the keys of a record, or of one to answer, that have no effect."""
        read = (self.key, *BESIDE, *(() if to_answer else self.answers))
        thoughts = {key for key in keys.THINKING if to_answer and record.get(key) not in keys.NOTHING}
        return keys.unread(record, read, to_answer) | thoughts


def _joined(before: Sequence[Turn], after: list[Turn]) -> list[Turn]:
    """Returns a question and an answer that are lists of messages, where the answer may repeat the question."""
    same = len(before)
    begins = [(turn.role, turn.content) for turn in after[:same]] == [(turn.role, turn.content) for turn in before]
    return [*before, *(after[same:] if begins else after)]


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
