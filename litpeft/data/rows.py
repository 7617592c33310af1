"""A row of the data set as tokens; splitting one, and showing one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from litpeft.core.errors import counted
from litpeft.core.terminal import GREEN, INVERSE, PLAIN
from litpeft.data.formats.turn import Turn
from litpeft.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Row:
    """One document to train on."""

    ids: list[int]
    trained: list[bool]  # trained[i]: ids[i] is a target of the loss; never the first token
    prompt_length: int  # tokens before the first trained one
    source: str  # file:line
    turns: Sequence[Turn]
    ended: bool = True  # the last trained token is the end-of-turn token


def cut(row: Row, length: int) -> list[Row]:
    """Returns pieces of at most `length` tokens that overlap by one token, so that no target is lost."""
    pieces = []
    last = len(row.trained) - 1 - row.trained[::-1].index(True)
    for start in range(0, len(row.ids) - 1, length - 1):
        trained = [False, *row.trained[start + 1 : start + length]]
        prompt = trained.index(True) if True in trained else len(trained)
        ended = row.ended and start < last < start + length
        pieces.append(Row(row.ids[start : start + length], trained, prompt, row.source, row.turns, ended))
    return pieces


def pieces(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Yields the text of a row in pieces, with whether each is trained, and whether it is a special token."""
    specials = set(tokenizer.backend.specials.values())
    position, done = 0, ""
    marks = (
        (trained, number if number in specials else None) for trained, number in zip(row.trained, row.ids, strict=True)
    )
    for (trained, special), group in groupby(marks):
        position += len(list(group))
        text = tokenizer.decode(row.ids[:position], skip_special=False)
        yield text[len(done) :], trained, special is not None
        done = text


def show(row: Row, tokenizer: Tokenizer, color: bool) -> str:
    """Returns the text of a row with its trained tokens in green, or else in [brackets]; special tokens stand out."""
    parts = []
    for trained, group in groupby(pieces(row, tokenizer), key=lambda piece: piece[1]):
        begin, end = (GREEN if trained else "", PLAIN) if color else ("[", "]") if trained else ("", "")
        text = "".join(f"{INVERSE}{_plain(t)}{PLAIN}{begin}" if s and color else _plain(t) for t, _, s in group)
        parts.append(f"{begin}{text}{end}" if trained else text)
    return "".join(parts)


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
    for row in rows:
        marked = [
            f'<span class="{"t " * trained}{"s" * special}">{escape(_plain(text))}</span>'
            if trained or special
            else escape(_plain(text))
            for text, trained, special in pieces(row, tokenizer)
        ]
        shown.append(f"<h4>{escape(title(row))}</h4><pre>{''.join(marked)}</pre>")
    return PAGE.format(rows="\n".join(shown))


def title(row: Row) -> str:
    """Returns the place of a row, with its tokens."""
    return f"{row.source}: {counted(len(row.ids), 'token')}, {sum(row.trained):,} trained"
