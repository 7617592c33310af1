"""Plain text, to go on training a base model with: trained whole, without a chat template.

{"text": "Paris is the capital of France."}
"""

from dataclasses import dataclass
from typing import Any

from litpeft.data.formats import keys
from litpeft.data.formats.turn import PLAIN, Turn, text

# beside a text one of these is likely what is to be learnt: such a row must be mapped, or called a text
TARGETS = ("label", "labels", "target", "targets", "class", "category", "summary", "answer", "output", "completion")


@dataclass(frozen=True)
class Document:
    """The format of rows that hold a text and nothing else that counts."""

    key: str
    note: str = ""

    @property
    def example(self) -> dict[str, Any]:
        return {self.key: "..."}

    def fits(self, record: dict[str, Any]) -> bool:
        """Returns whether a row has a text, and no key that is to be learnt from it."""
        return self.key in record and not any(key in record for key in TARGETS)

    def resembles(self, record: dict[str, Any]) -> bool:
        return False

    def turns(self, record: Any) -> list[Turn]:
        """Returns the one turn of a record; raises ValueError naming the key that is wrong."""
        if not isinstance(record, dict):
            raise ValueError(f"a row must be an object, got {type(record).__name__}")
        tree = {"parent_id": "the text is a message of a tree; data.path openassistant reads such trees"}
        keys.refuse(record, more=tree)
        return keys.weighted([Turn(PLAIN, text(record, self.key, self.key, empty=False))], record)

    def asked(self, record: Any) -> list[Turn]:
        """Raises ValueError: a document has no question."""
        raise ValueError(f'a row of {self.key} alone has no question: map it as columns {{"user": "{self.key}"}}')

    def unread(self, record: dict[str, Any], to_answer: bool = False) -> set[str]:
        """Returns the keys of a record, or of one to answer, that have no effect."""
        return keys.unread(record, (self.key,), to_answer)


FORMAT = Document("text")
