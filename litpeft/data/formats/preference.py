"""A prompt with a chosen and a rejected answer: the chosen one is trained like any answer, the rejected one not read.

{"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Lyon."}

Each may be a list of messages. The prompt may be called `question` or `instruction`, or be missing where the chosen
messages begin with it.
"""

from dataclasses import replace
from typing import Any

from litpeft.data.formats import keys
from litpeft.data.formats.pair import LIST, Pair
from litpeft.data.formats.turn import Turn

QUESTIONS = ("prompt", "question", "instruction")


class Preference(Pair):
    """The format of rows that have a better and a worse answer."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Returns whether a row has a chosen and a rejected answer."""
        return "chosen" in record and "rejected" in record

    resembles = fits

    def turns(self, record: Any) -> list[Turn]:
        """Returns the turns of a record, of which those of the chosen answer are trained."""
        pair, beside = self._pair(record), ("tools", *keys.TOLD)
        if pair.key in record or not isinstance(record.get("chosen"), list):
            return Pair.turns(pair, record)
        keys.refuse(record, known=("chosen", "rejected", *beside))
        more = {key: record[key] for key in ("system", *keys.SWITCHES, *beside) if key in record}
        return LIST.turns({"messages": record["chosen"]} | more)

    def unread(self, record: dict[str, Any], to_answer: bool = False) -> set[str]:
        """Returns the keys of a record that have no effect, `rejected` among them."""
        return Pair.unread(self._pair(record), record, to_answer) | {"rejected"}

    def _pair(self, record: Any) -> Pair:
        return replace(self, key=next((key for key in QUESTIONS if key in record), QUESTIONS[0]))


FORMAT = Preference("prompt", ("chosen",), ("rejected",), "only the chosen answer is trained")
