"""The two libraries that turn text into token ids, behind one small interface.

Both give `ids` (token -> id), `names` (id -> token), `specials` (those of `ids` that are special), `encode`,
`encode_around`, `decode`, `bos_first` (whether plain text is meant to start with BOS) and `make_special`, which is
called once, before the first text.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers

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
    """Returns whether any of the spans shares a character with start..end."""
    return any(a < end and start < b for a, b in spans)


class JsonBackend:
    """A tokenizer.json, run by the tokenizers library."""

    def __init__(self, path: Path, declared: dict[int, dict[str, Any]]):
        """`declared` is the added_tokens_decoder of tokenizer_config.json: id -> {content, special, ...}."""
        self.inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        self.inner.no_truncation()
        self.inner.no_padding()
        for number, token in sorted(declared.items()):
            if self.inner.token_to_id(token["content"]) is None:
                self.inner.add_tokens([tokenizers.AddedToken(**token)])
                if self.inner.token_to_id(token["content"]) != number:
                    raise ValueError(f"token {token['content']!r} cannot get its id {number}")
        self._first = self.inner.encode("", add_special_tokens=True).ids[:1]
        # A post-processor adds tokens, which templates do, and may trim spaces off the offsets.
        self.inner.post_processor = None
        self.ids = self.inner.get_vocab(with_added_tokens=True)
        self.names = {number: name for name, number in self.ids.items()}

    def bos_first(self, bos: int | None) -> bool:
        return bos is not None and self._first == [bos]

    def make_special(self, tokens: list[str]) -> None:
        """Sees to it that these tokens of the vocabulary are special, and collects all that are."""
        self.inner.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
        added = self.inner.get_added_tokens_decoder()
        self.specials = {token.content: number for number, token in added.items() if token.special}

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [Encoded(e.ids, e.offsets) for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def encode_around(self, text: str, plain: list[Span]) -> Encoded:
        """Returns the tokens of a text in which special tokens count as such only outside the spans `plain`."""
        twin, spelling, ids = self._twin
        if any(name in text for name in spelling.values()):
            raise ValueError("the text holds private-use characters that stand for a special token")
        pieces, origin, position = [], [], 0  # origin: where in `text` each character of the spelled-out text lies
        for match in any_of(list(spelling)).finditer(text):
            if overlaps(plain, *match.span()):
                continue
            pieces += [text[position : match.start()], spelling[match[0]]]
            origin += [*range(position, match.start()), *[match.start()] * len(pieces[-1])]
            position = match.end()
        pieces.append(text[position:])
        origin += range(position, len(text) + 1)
        encoded = twin.encode("".join(pieces), add_special_tokens=False)
        return Encoded([ids.get(i, i) for i in encoded.ids], [(origin[a], origin[b]) for a, b in encoded.offsets])

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A copy that reads special tokens as plain text, but knows each by a second, private-use spelling."""
        twin = tokenizers.Tokenizer.from_str(self.inner.to_str())
        twin.encode_special_tokens = True
        spelling = {text: f"\U0010fffc{chr(0x100000 + k)}\U0010fffd" for k, text in enumerate(self.specials)}
        added, tokens = self.inner.get_added_tokens_decoder(), []
        for text, number in self.specials.items():
            t = added[number]
            flags = {"single_word": t.single_word, "lstrip": t.lstrip, "rstrip": t.rstrip, "normalized": t.normalized}
            tokens.append(tokenizers.AddedToken(spelling[text], special=False, **flags))
        twin.add_tokens(tokens)
        return twin, spelling, {twin.token_to_id(spelling[text]): number for text, number in self.specials.items()}

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special)


class PieceBackend:
    """A tokenizer.model, run by sentencepiece; every text between special tokens is encoded as one of its own."""

    def __init__(self, path: Path, declared: dict[int, dict[str, Any]]):
        import sentencepiece

        self.inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        count = self.inner.get_piece_size()
        self._added = {token["content"]: i for i, token in declared.items()}
        self.names = {i: self.inner.id_to_piece(i) for i in range(count)} | {i: t for t, i in self._added.items()}
        self.ids = {text: i for i, text in self.names.items()}
        self.specials = {self.names[i]: i for i in range(count) if self.inner.is_control(i)}
        self.specials |= {token["content"]: i for i, token in declared.items() if token.get("special", False)}

    def bos_first(self, bos: int | None) -> bool:
        return bos is not None  # what Llama's tokenizer does unless tokenizer_config.json says otherwise

    def make_special(self, tokens: list[str]) -> None:
        """Sees to it that these tokens of the vocabulary are special, and collects all that are."""
        self.specials |= {token: self.ids[token] for token in tokens}
        self._found = {**self._added, **self.specials}
        self._pattern = any_of(list(self._found))

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [self.encode_around(text, []) for text in texts]

    def encode_around(self, text: str, plain: list[Span]) -> Encoded:
        """Returns the tokens of a text in which special tokens count as such only outside the spans `plain`."""
        ids, offsets, position = [], [], 0
        for match in self._pattern.finditer(text):
            if match[0] in self.specials and overlaps(plain, *match.span()):
                continue
            self._segment(text, position, match.start(), ids, offsets)
            ids.append(self._found[match[0]])
            offsets.append(match.span())
            position = match.end()
        self._segment(text, position, len(text), ids, offsets)
        return Encoded(ids, offsets)

    def _segment(self, text: str, start: int, end: int, ids: list[int], offsets: list[Span]) -> None:
        if start == end:
            return
        found = self.inner.encode(text[start:end], return_type="offset_mapping")
        ids += found["ids"]
        offsets += [(start + a, start + b) for a, b in found["offsets"]]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        special = {number: text for text, number in self._found.items()}
        parts = []
        for is_special, run in groupby(ids, special.__contains__):
            if not is_special:
                parts.append(self.inner.decode(list(run)))
            else:
                parts += [special[i] for i in run if not (skip_special and special[i] in self.specials)]
        return "".join(parts)
