"""A row of the data set as tokens; splitting one, and showing one."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from litpeft.core.errors import counted, some
from litpeft.core.terminal import GREEN, INVERSE, PLAIN
from litpeft.data.formats.turn import Turn
from litpeft.data.tokenizer import Tokenizer

REJECTED = "rejected:"  # stands between the two answers of a pair


@dataclass(frozen=True, slots=True)
class Row:
    """One document to train on."""

    ids: list[int]
    trained: list[bool]  # trained[i]: ids[i] is a target of the loss; never the first token
    prompt_length: int  # tokens before the first trained one
    source: str  # file:line
    turns: Sequence[Turn]
    ended: bool = True  # the last trained token is the end-of-turn token
    weights: list[float] | None = None  # of each token in the loss, 0 where it is not trained; None: all have weight 1
    rejected: "Row | None" = None  # of a pair: the same prompt with the worse answer
    references: tuple[float, float] | None = None  # of a pair: log p of its answers at the run's start

    @property
    def content(self) -> bytes:
        """Returns what of the row is trained, as bytes to hash."""
        trained = self.ids, self.trained
        own = repr(trained if self.weights is None else (*trained, self.weights)).encode()
        return own if self.rejected is None else own + self.rejected.content

    @property
    def documents(self) -> list["Row"]:
        """Returns what the model reads of the row: itself, and of a pair the rejected answer after it."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def tokens(self) -> int:
        return sum(len(one.ids) for one in self.documents)


def totals(rows: Iterable[Row]) -> tuple[int, float]:
    """Returns how many tokens of rows are trained, and the sum of their weights: what their loss is divided by."""
    count = weight = 0
    for row in rows:
        trained = sum(row.trained)
        count += trained
        weight += trained if row.weights is None else math.fsum(row.weights)
    return count, weight


def cut(row: Row, length: int) -> list[Row]:
    """Returns pieces of at most `length` tokens that overlap by one token, so that no target is lost."""
    pieces = []
    last = len(row.trained) - 1 - row.trained[::-1].index(True)
    for start in range(0, len(row.ids) - 1, length - 1):
        trained = [False, *row.trained[start + 1 : start + length]]
        prompt = trained.index(True) if True in trained else len(trained)
        ended = row.ended and start < last < start + length
        weights = None if row.weights is None else [0.0, *row.weights[start + 1 : start + length]]
        pieces.append(Row(row.ids[start : start + length], trained, prompt, row.source, row.turns, ended, weights))
    return pieces


def pieces(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[str, float, bool]]:
    """Yields the text of a row in pieces, with the weight of each (0: not trained), and whether it is special."""
    specials = set(tokenizer.backend.specials.values())
    position, done = 0, ""
    weights = zip(row.trained if row.weights is None else row.weights, row.ids, strict=True)
    marks = ((float(weight), number if number in specials else None) for weight, number in weights)
    for (weight, special), group in groupby(marks):
        position += len(list(group))
        text = tokenizer.decode(row.ids[:position], skip_special=False)
        yield text[len(done) :], weight, special is not None
        done = text


def said(row: Row) -> str:
    """Returns all that is said in a row, without what the template adds."""
    return "\n".join(
        part
        for turn in row.turns
        for part in (turn.content, turn.input, turn.thinking, *(json.dumps(call) for call in turn.calls))
        if part
    )


def show(row: Row, tokenizer: Tokenizer, color: bool) -> str:
    """Returns the text of a row with its trained tokens in green, or else in [brackets]; special tokens stand out.

    What has another weight than 1 in the loss is followed by it. Of a pair both answers are shown.
    """
    if row.rejected is not None:
        chosen, rejected = (_shown(one, tokenizer, color) for one in row.documents)
        return f"{chosen.rstrip()}\n{REJECTED}\n{rejected}"
    return _shown(row, tokenizer, color)


def _shown(row: Row, tokenizer: Tokenizer, color: bool) -> str:
    parts = []
    for weight, group in groupby(pieces(row, tokenizer), key=lambda piece: piece[1]):
        begin, end = (GREEN if weight else "", PLAIN) if color else ("[", "]") if weight else ("", "")
        text = "".join(f"{INVERSE}{_plain(t)}{PLAIN}{begin}" if s and color else _plain(t) for t, _, s in group)
        parts.append(f"{begin}{text}{end}{_times(weight)}" if weight else text)
    return "".join(parts)


def _times(weight: float) -> str:
    """Returns a weight to stand behind what it multiplies; "" if it is 1."""
    return "" if weight == 1 else f"×{weight:.6g}"


def _hover(weight: float) -> str:
    """Returns the HTML attribute that shows a weight under the mouse; "" if it is 1 or 0."""
    return "" if weight in (0, 1) else f' title="weight {weight:.6g}"'


def _plain(text: str) -> str:
    """Returns a text whose control characters are escaped: a row may hold codes for the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


PAGE = """<!doctype html><meta charset="utf-8"><title>Rows as the model sees them</title>
<style>body{{font:14px/1.5 sans-serif;margin:2em;max-width:60em}}
pre{{white-space:pre-wrap;background:#f6f6f6;padding:1em}}
.t{{background:#c6f0c6}}.s{{color:#a0007a;font-weight:bold}}</style>
<p><span class="t">trained</span>, <span class="s">special token</span></p>
{rows}
"""


def page(rows: Sequence[Row], tokenizer: Tokenizer) -> str:
    """Returns an HTML page that shows rows as the model sees them."""
    shown = []
    for heading, one in [part for row in rows for part in zip((title(row), REJECTED), row.documents, strict=False)]:
        marked = [
            f'<span class="{"t " * (weight > 0)}{"s" * special}"{_hover(weight)}>{escape(_plain(text))}</span>'
            if weight or special
            else escape(_plain(text))
            for text, weight, special in pieces(one, tokenizer)
        ]
        shown.append(f"<h4>{escape(heading)}</h4><pre>{''.join(marked)}</pre>")
    return PAGE.format(rows="\n".join(shown))


def title(row: Row) -> str:
    """Returns the place of a row, with its tokens and their weights."""
    weights = [f"{weight:.6g}" for weight in sorted({*row.weights} - {0.0})] if row.weights else []
    told = f", weight{'s' * (len(weights) > 1)} {some(weights)}" if weights else ""
    trained = sum(sum(one.trained) for one in row.documents)
    return f"{row.source}: {counted(row.tokens, 'token')}, {trained:,} trained{told}"
