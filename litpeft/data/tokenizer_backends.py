"""The library that turns text into token ids, behind a small interface.

`ids` (token -> id), `names` (id -> token), `specials` (those of `ids` that are special), `encode`, `encode_around`,
`decode`, `bos_first` (whether plain text is meant to start with BOS) and `make_special`, which is called once, before
the first text.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import tokenizers

WORD = re.compile(r"\w")
Span = tuple[int, int]  # start and end in a text, in characters


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text; `offsets` says which characters each stands for."""

    ids: list[int]
    offsets: list[Span]


def any_of(words: list[str]) -> re.Pattern[str]:
    """Returns a pattern that finds the words, the longest first; it finds nothing if there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def overlaps(spans: list[Span], start: int, end: int) -> bool:
    """Returns whether any of the spans, which are in order and apart, shares a character with start..end."""
    begun = bisect_left(spans, (end,))  # a row of a few MiB may have a million of them
    return begun > 0 and spans[begun - 1][1] > start


class Backend:
    """A tokenizer of the tokenizers library, without what its file adds to each text."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        self.inner.no_truncation()
        self.inner.no_padding()
        self._first = self.inner.encode("", add_special_tokens=True).ids[:1]
        # A post-processor adds tokens, which templates do, and may trim spaces off the offsets.
        self.inner.post_processor = None
        self.ids = self.inner.get_vocab(with_added_tokens=True)
        self.names = {number: name for name, number in self.ids.items()}

    def bos_first(self, bos: int | None) -> bool:
        return bos is not None and self._first == [bos]

    def make_special(self, tokens: list[str]) -> None:
        """Sees to it that these tokens of the vocabulary are special, and collects all that are."""
        added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        for text in tokens:
            token = added.get(text, tokenizers.AddedToken(text, normalized=False))
            token.special = True
            self.inner.add_tokens([token])
        self.added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        self.specials = {text: self.ids[text] for text, token in self.added.items() if token.special}

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [Encoded(e.ids, e.offsets) for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def encode_around(self, text: str, plain: list[Span]) -> Encoded:
        """Returns the tokens of a text in which special tokens count as such only outside the spans `plain`."""
        twin, spelling, ids = self._twin
        if any(name in text for name in spelling.values()):
            raise ValueError("the text holds private-use characters that stand for a special token")
        pieces, origin, position = [], [], 0  # origin: where in `text` each character of the spelled-out text lies
        for start, end in self._marks(text):
            if overlaps(plain, start, end):
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
            yield from (match.span() for match in self._pattern.finditer(text))
            return
        encoded = self.inner.encode(text, add_special_tokens=False)  # it depends on what is beside them
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            name = self.names[number]
            if name not in self.specials or (start := text.find(name, start, end)) < 0:
                continue
            end = start + len(name)
            word = WORD.search(text[max(0, start - 1) : start] + text[end : end + 1])  # then it is plain text
            if not (word and self.added[name].single_word):
                yield start, end

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(list(self.specials))

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A copy that reads special tokens as plain text, but knows each by a second, private-use spelling."""
        twin = tokenizers.Tokenizer.from_str(self.inner.to_str())
        twin.encode_special_tokens = True
        spelling = {text: f"\U0010fffc{chr(0x100000 + k)}\U0010fffd" for k, text in enumerate(self.specials)}
        tokens = []
        for text in self.specials:
            t = self.added[text]
            flags = {"single_word": t.single_word, "lstrip": t.lstrip, "rstrip": t.rstrip, "normalized": t.normalized}
            tokens.append(tokenizers.AddedToken(spelling[text], special=False, **flags))
        twin.add_tokens(tokens)
        return twin, spelling, {twin.token_to_id(spelling[text]): number for text, number in self.specials.items()}

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special)
