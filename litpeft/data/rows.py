"""A row of the data set as tokens; splitting one, and showing one."""

from dataclasses import dataclass
from itertools import groupby

from litpeft.core.terminal import GREEN, PLAIN
from litpeft.data.formats.turn import Turn
from litpeft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Row:
    """One document to train on."""

    ids: list[int]
    trained: list[bool]  # trained[i]: ids[i] is a target of the loss; never the first token
    prompt_length: int  # tokens before the first trained one
    source: str  # file:line
    turns: list[Turn]
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


def show(row: Row, tokenizer: Tokenizer, color: bool) -> str:
    """Returns the text of a row with its trained tokens in green, or else in [brackets]."""
    before, after = (GREEN, PLAIN) if color else ("[", "]")
    parts, position, done = [], 0, ""
    for trained, group in groupby(row.trained):
        position += len(list(group))
        text = tokenizer.decode(row.ids[:position], skip_special=False)
        # control characters are escaped: a row may hold codes for the terminal
        piece = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text[len(done) :])
        parts.append(f"{before}{piece}{after}" if trained else piece)
        done = text
    return "".join(parts)
