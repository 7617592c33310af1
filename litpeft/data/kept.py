"""Rows with thoughts: trained as the chat template writes them, and what is done where it leaves thoughts out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from litpeft.core.errors import counted
from litpeft.data.formats.turn import Turn
from litpeft.data.sandbox import TooLong
from litpeft.data.settings import Thinking
from litpeft.data.templates import ChatTemplate, Rendered
from litpeft.data.thinking import answer_of, thoughts_of

E = TypeVar("E")  # a chat: its `turns`, and `where` it comes from


@dataclass
class Thoughts:
    """What became of the thoughts of a data set."""

    key: str = ""  # of a message, under which the template reads them
    rows: int = 0
    answers: int = 0  # trained ones, with thoughts
    without: int = 0  # of these are trained without them
    parted: int = 0  # rows that became one row for each answer
    parts: int = 0  # those rows

    def __str__(self) -> str:
        """Returns the line of the report; "" if there are none."""
        if not self.answers:
            return ""
        told = f"{counted(self.answers, 'answer')} with thoughts in {counted(self.rows, 'row')}"
        told += f", given to the template as {self.key}" if self.key else ", in the text as <think>...</think>"
        if self.without:
            told += f"; warning: it leaves out those of {counted(self.without, 'answer')}, trained without (drop)"
        if self.parted:
            told += f"; {counted(self.parted, 'row')} made {self.parts:,} of one trained answer each (keep)"
        return told


def judged(
    examples: Sequence[E],
    found: Sequence[Rendered | ValueError],
    template: ChatTemplate,
    mode: Thinking,
    told: Thoughts,
    option: str,
) -> Iterator[tuple[E, Rendered | ValueError]]:
    """Yields each chat with its text; where the template leaves out thoughts, as `mode` says. Counts in `told`."""
    for example, rendered in zip(examples, found, strict=True):
        thoughtful = [turn for turn in example.turns if turn.trained and thoughts_of(turn)]
        if not thoughtful or isinstance(rendered, TooLong) or (mode != "keep" and isinstance(rendered, ValueError)):
            yield example, rendered
            continue
        told.key = template.thinking_key or ""
        dropped = len(thoughtful) if isinstance(rendered, ValueError) else len(rendered.dropped)
        if dropped and mode == "error":
            left = f"the chat template leaves out the thoughts of {dropped} of its {counted(len(thoughtful), 'answer')}"
            yield example, ValueError(f"{left}: {option} keep trains them all the same, drop trains the answers alone")
            continue
        told.rows += 1
        told.answers += len(thoughtful)
        if not dropped:
            yield example, rendered
            continue
        if mode == "drop":
            told.without += dropped
            parts = [replace(example, turns=_without(example.turns, rendered.dropped))]
        else:
            parts = [replace(example, turns=turns) for turns in _each_answer(example.turns)]
            told.parted += 1
            told.parts += len(parts)
        chats, places = [part.turns for part in parts], [part.where for part in parts]
        yield from zip(parts, template.spans_of(chats, places, keep=mode == "keep"), strict=True)


def _without(turns: Sequence[Turn], numbers: Sequence[int]) -> list[Turn]:
    """Returns the chat without the thoughts of some of its turns."""
    return [
        replace(turn, content=answer_of(turn), thinking="") if i in numbers else turn for i, turn in enumerate(turns)
    ]


def _each_answer(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Yields the chat up to each trained answer, of which that one alone is trained."""
    for i, turn in enumerate(turns):
        if turn.trained:
            yield [*(replace(one, train=False) if one.trained else one for one in turns[:i]), turn]
