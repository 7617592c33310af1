"""Guessing how a text goes on from what it said before: several tokens are then checked in one pass of the model.

Prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding: speculation without a second model. A pass over a
few tokens reads the weights once, as a pass over one does, and that is what it waits for.
"""

from collections.abc import Sequence

GRAM = 2  # tokens that must have been there before


class Lookup:
    """The guesses for one text that grows. As many tokens are guessed as guesses were right before."""

    def __init__(self, most: int):
        self.most = self.width = most
        self.after: dict[tuple[int, ...], int] = {}  # where the text went on after these tokens, the last time
        self.noted = GRAM

    def guess(self, ids: Sequence[int], limit: int) -> list[int]:
        """Returns at most `limit` tokens that may follow; a text that goes round in circles is thought to go on."""
        for end in range(self.noted, len(ids)):
            self.after[tuple(ids[end - GRAM : end])] = end
        self.noted = max(self.noted, len(ids))
        start = self.after.get(tuple(ids[-GRAM:]))
        if start is None:
            return []
        return [ids[start + n % (len(ids) - start)] for n in range(min(self.width, limit))]

    def learn(self, right: int) -> None:
        """Takes how many tokens of a guess were right."""
        self.width = min(self.most, max(1, 2 * right))
