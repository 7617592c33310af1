"""The tokenizers library, as litpeft uses it."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

import tokenizers

WORD = re.compile(r"\w")
Span = tuple[int, int]  # start and end in a text, in characters


class Encoded(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    offsets: list[Span]  # the characters that each token stands for


def overlaps(spans: list[Span], start: int, end: int) -> bool:
    """Returns whether any of the spans, which are sorted and disjoint, shares a character with start..end."""
    begun = bisect_left(spans, (end,))  # a row of a few MiB may have a million spans
    return begun > 0 and spans[begun - 1][1] > start


def _before(inner: tokenizers.Tokenizer) -> list[int]:
    """Returns the special tokens that the file puts before a text."""
    marked = inner.encode("a", add_special_tokens=True)
    return [
        number
        for number, _ in takewhile(lambda pair: pair[1], zip(marked.ids, marked.special_tokens_mask, strict=True))
    ]


class Backend:
    """A tokenizer of the library without truncation, padding and added tokens. `make_special` comes before encoding."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        self.inner.no_truncation()
        self.inner.no_padding()
        self.before = _before(inner)
        # A post-processor adds tokens, which templates do, and may trim spaces off the offsets.
        self.inner.post_processor = None
        self._read_ids()

    def _read_ids(self) -> None:
        self.ids = self.inner.get_vocab(with_added_tokens=True)  # token -> id
        self.names = {number: name for name, number in self.ids.items()}  # id -> token

    def add(self, tokens: Sequence[str]) -> None:
        """Adds tokens that are not special, with the ids after the last one."""
        self.inner.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
        self._read_ids()
        self.make_special([])

    def make_special(self, tokens: list[str]) -> None:
        """Marks these tokens of the vocabulary as special, and sets `specials`, all that are, and their pattern."""
        added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        for text in tokens:
            token = added.get(text, tokenizers.AddedToken(text, normalized=False))
            token.special = True
            self.inner.add_tokens([token])
        self.added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        self.specials = {text: self.ids[text] for text, token in self.added.items() if token.special}
        longest_first = map(re.escape, sorted(self.specials, key=len, reverse=True))
        self.special_pattern = re.compile("|".join(longest_first) or "(?!)")  # which matches nothing

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [Encoded(e.ids, e.offsets) for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def encode_around(self, text: str, literal: list[Span]) -> Encoded:
        """Returns the tokens of a text whose special tokens are plain text within the spans `literal`."""
        twin, spelling, ids = self._twin
        if any(name in text for name in spelling.values()):
            raise ValueError("the text holds private-use characters that stand for a special token")
        pieces, origin, position = [], [], 0  # origin: where in `text` each character of the spelled-out text lies
        for start, end in self._marks(text):
            if overlaps(literal, start, end):
                continue
            pieces += [text[position:start], spelling[text[start:end]]]
            origin += [*range(position, start), *[start] * len(pieces[-1])]
            position = end
        pieces.append(text[position:])
        origin += range(position, len(text) + 1)
        encoded = twin.encode("".join(pieces), add_special_tokens=False)
        return Encoded([ids.get(i, i) for i in encoded.ids], [(origin[a], origin[b]) for a, b in encoded.offsets])

    def _marks(self, text: str) -> Iterator[Span]:
        """Yields where special tokens stand in a text, from left to right."""
        if not any(self.added[name].single_word or self.added[name].normalized for name in self.specials):
            yield from (match.span() for match in self.special_pattern.finditer(text))
            return
        encoded = self.inner.encode(text, add_special_tokens=False)  # whether they match depends on their neighbours
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            name = self.names[number]
            if name not in self.specials or (start := text.find(name, start, end)) < 0:
                continue
            end = start + len(name)
            beside = text[max(0, start - 1) : start] + text[end : end + 1]
            if not (self.added[name].single_word and WORD.search(beside)):
                yield start, end

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A copy that reads special tokens as plain text and has a private-use spelling for each, with its id."""
        twin = tokenizers.Tokenizer.from_str(self.inner.to_str())
        twin.encode_special_tokens = True
        spelling = {text: f"\U0010fffc{chr(0x100000 + k)}\U0010fffd" for k, text in enumerate(self.specials)}
        tokens = []
        for text, spelt in spelling.items():
            t = self.added[text]
            flags = {"single_word": t.single_word, "lstrip": t.lstrip, "rstrip": t.rstrip, "normalized": t.normalized}
            tokens.append(tokenizers.AddedToken(spelt, special=False, **flags))
        twin.add_tokens(tokens)
        return twin, spelling, {twin.token_to_id(spelling[text]): number for text, number in self.specials.items()}

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special)
