"""A prompt with a chosen and a rejected answer.

{"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Lyon."}

Each may be a list of messages. The prompt may be called `question` or `instruction`, or be missing where the chosen and
the rejected messages begin with it. With preference.loss both answers are compared; without it the chosen one is
trained like any answer, and the rejected one is not read.
"""

from dataclasses import replace
from typing import Any

from litpeft.data.formats import keys
from litpeft.data.formats.pair import LIST, Pair
from litpeft.data.formats.turn import Turn

QUESTIONS = ("prompt", "question", "instruction")


class Preference(Pair):
    """The format of rows that have a better and a worse answer; it reads the first of `answers`."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Returns whether a row has a chosen and a rejected answer."""
        return "chosen" in record and "rejected" in record

    resembles = fits

    def turns(self, record: Any) -> list[Turn]:
        """Returns the turns of a record, of which those of the answer are trained."""
        pair, beside, (answer,) = self._pair(record), ("tools", *keys.TOLD), self.answers
        if pair.key in record or not isinstance(record.get(answer), list):
            return Pair.turns(pair, record)
        keys.refuse(record, known=("chosen", "rejected", *beside))
        more = {key: record[key] for key in ("system", *keys.SWITCHES, *beside) if key in record}
        return LIST.turns({"messages": record[answer]} | more)

    def unread(self, record: dict[str, Any], to_answer: bool = False) -> set[str]:
        """Returns the keys of a record that have no effect, `rejected` among them."""
        return Pair.unread(self._pair(record), record, to_answer) | {"rejected"}

    def _pair(self, record: Any) -> Pair:
        return replace(self, key=next((key for key in QUESTIONS if key in record), QUESTIONS[0]))


FORMAT = Preference("prompt", ("chosen",), ("rejected",), "only the chosen answer is trained: see preference.loss")
WORSE = Preference("prompt", ("rejected",), ("chosen",))  # reads the rejected answer


def both(record: dict[str, Any]) -> tuple[list[Turn], list[Turn]]:
    """Returns the turns with the chosen and with the rejected answer; raises ValueError for what cannot be compared.

    The messages in which both begin alike are their prompt: none of them is trained.
    """
    told = [key for key in keys.THINKING if record.get(key) not in keys.NOTHING]
    if told:
        what = "it does not say to which answer it belongs: write <think>...</think> into each"
        raise ValueError(f"{told[0]} is not supported in a pair: {what}")
    chosen, rejected = FORMAT.turns(record), WORSE.turns(record)
    same = 0
    while same < min(len(chosen), len(rejected)) and _untrained(chosen[same]) == _untrained(rejected[same]):
        same += 1
    if not same:
        raise ValueError("chosen and rejected share no prompt: their first messages differ")
    if same == len(chosen) == len(rejected):
        raise ValueError("chosen and rejected are alike: there is nothing to prefer")
    chosen, rejected = ([*map(_untrained, one[:same]), *one[same:]] for one in (chosen, rejected))
    for name, one in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn.trained for turn in one):
            raise ValueError(f"{name} has no answer of its own to train")
    if len({turn.weight for turn in (*chosen, *rejected) if turn.trained}) > 1:
        raise ValueError("the messages of a pair cannot have weights of their own: give the row one")
    return chosen, rejected


def _untrained(turn: Turn) -> Turn:
    return replace(turn, train=False, weight=1.0) if turn.role == "assistant" else turn


def unread(record: dict[str, Any]) -> set[str]:
    """Returns the keys of a pair that have no effect."""
    return FORMAT.unread(record) - {"rejected"}
