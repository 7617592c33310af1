"""Guesses the next tokens of a text from what it said before; the model checks several in one pass.

Prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding: speculation without a second model. Passes over
one or a few tokens are bound by reading the weights, which both do once.
"""

from collections.abc import Sequence

GRAM = 2  # last tokens that must have occurred before


class Lookup:
    """The guesses for one text that grows. How many tokens are guessed follows how many were right before."""

    def __init__(self, most: int):
        self.most = self.width = most
        self.after: dict[tuple[int, ...], int] = {}  # tokens -> position after their last occurrence
        self.noted = GRAM

    def guess(self, ids: Sequence[int], limit: int) -> list[int]:
        """Returns at most `limit` tokens that may follow; a text that repeats itself is guessed to go on so."""
        for end in range(self.noted, len(ids)):
            self.after[tuple(ids[end - GRAM : end])] = end
        self.noted = max(self.noted, len(ids))
        start = self.after.get(tuple(ids[-GRAM:]))
        if start is None:
            return []
        return [ids[start + n % (len(ids) - start)] for n in range(min(self.width, limit))]

    def learn(self, right: int) -> None:
        """Adapts to how many tokens of a guess were right."""
        self.width = min(self.most, max(1, 2 * right))
