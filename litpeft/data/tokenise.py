"""Rows of a data set as tokens, each with the mask of what is trained, and a report of what became of every row."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from litpeft.core.errors import UserError, some
from litpeft.core.terminal import GREEN, PLAIN, clean
from litpeft.data.formats import FORMATS, SHAPES, UNREAD, detect
from litpeft.data.formats.keys import told
from litpeft.data.formats.turn import Turn
from litpeft.data.sandbox import TooLong
from litpeft.data.settings import Data
from litpeft.data.sources import Rejected, find, records, split
from litpeft.data.templates import ChatTemplate, Rendered, with_system
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Encoded

CHUNK = 1000  # rows that are encoded at once
SHOWN = 5  # rows that an error names
HUGE = 1 << 23  # characters


@dataclass(frozen=True)
class Row:
    """One document to learn from."""

    ids: list[int]
    trained: list[bool]  # trained[i]: the loss asks the model to predict ids[i]; never of the first token
    prompt_length: int  # tokens before the first trained one
    source: str  # file:line
    turns: list[Turn]
    ended: bool = True  # the end-of-turn token of the last trained answer is trained


@dataclass(frozen=True)
class Example:
    """A chat and the line it comes from."""

    turns: list[Turn]
    where: str


@dataclass
class Counts:
    """What a list of rows amounts to."""

    rows: int
    tokens: int
    trained: int
    longest: int  # tokens
    ended: int  # rows whose end-of-turn token is trained

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Counts":
        tokens, trained = sum(len(row.ids) for row in rows), sum(sum(row.trained) for row in rows)
        longest = max((len(row.ids) for row in rows), default=0)
        return cls(len(rows), tokens, trained, longest, sum(row.ended for row in rows))

    def __str__(self) -> str:
        if not self.rows:
            return "none"
        share, ended = self.trained / self.tokens, self.ended / self.rows
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained:,} trained ({share:.1%}); "
            f"longest {self.longest:,}; end-of-turn token trained in {ended:.1%} of the rows"
        )


@dataclass
class Report:
    """What became of every row of the files, and of every key of a row; `str` is what the user sees."""

    train: Counts
    validation: Counts
    template: str  # name of the template
    max_length: int  # the limit that was applied, in tokens
    rejected: list[Rejected] = field(default_factory=list)  # rows that cannot be used
    dropped: list[Rejected] = field(default_factory=list)  # over-long rows left out
    split_rows: int = 0  # over-long rows cut up
    split_pieces: int = 0  # into so many pieces that are trained
    empty_pieces: int = 0  # and so many, left out, in which nothing is trained
    straddling: int = 0  # rows in which a token holds the end of a prompt and the start of its answer
    duplicates: int = 0  # held-out rows that are among the rows to train on
    unread: Counter[str] = field(default_factory=Counter)  # key that no format reads -> rows with it
    unlike: list[str] = field(default_factory=list)  # file:line of rows that do not begin as their answer is asked for
    difference: str = ""  # how the first of these differs

    def __str__(self) -> str:
        lines = [f"train       {self.train}", f"validation  {self.validation}", f"template    {self.template}"]
        return "\n".join([*lines, *self.notes])

    @property
    def notes(self) -> list[str]:
        """Returns what the user should know before trusting the figures, a line each."""
        long = f"longer than {self.max_length:,} tokens"

        def out(rows: list[Rejected]) -> str:
            named = some([f"{row.where} ({row.reason})" for row in rows])
            return f"left out: {named}; the run's rejected.jsonl lists them"

        notes = {
            f"not read    the keys {told(self.unread)}": self.unread,
            f"warning: {len(self.rejected):,} rows cannot be used and are {out(self.rejected)}": self.rejected,
            f"warning: {len(self.dropped):,} rows are {long} and are {out(self.dropped)}": self.dropped,
            f"warning: {self.split_rows:,} rows are {long} and are cut into {self.split_pieces:,} pieces; "
            f"{self.empty_pieces:,} more hold nothing to train": self.split_rows,
            f"warning: {self.straddling:,} rows have a token across the end of a prompt and the start of an answer; "
            "it is trained": self.straddling,
            f"warning: in {len(self.unlike):,} rows the prompt that asks for the answer is not how the row begins: "
            f"{self.difference} ({some(self.unlike)})": self.unlike,
            f"warning: {self.duplicates:,} of the held-out rows are among the rows to train on": self.duplicates,
        }
        return [clean(note).replace("\n", " ") for note, present in notes.items() if present]


@dataclass
class DataSet:
    """Rows to train on, rows held out, and what is to be known about them."""

    train: list[Row]
    validation: list[Row]
    report: Report

    @property
    def rejected(self) -> list[Rejected]:
        """Returns all rows that are left out."""
        return [*self.report.rejected, *self.report.dropped]


def load_dataset(
    data: Data, tokenizer: Tokenizer, template: ChatTemplate, max_positions: int, only_measured: bool = False
) -> DataSet:
    """Returns the data set that the settings name, ready to train on. Prints nothing.

    Where the rows are `only_measured`, none may be left out or cut, and errors do not offer it.
    """
    # 1. files to chats
    path, held_out = find(data.path, data.validation_path)
    if held_out is not None and data.validation_split not in (0, Data.validation_split):
        what, hint = f"{data.validation_split} is of no use: the rows of {held_out} are held out", "leave it out"
        hint += "" if data.validation_path else f", or name {path} as data.path instead of its folder"
        raise UserError("CONFIG-094", what, where="data.validation_split", hint=hint)
    report = Report(Counts.of([]), Counts.of([]), template.name, min(data.max_length, max_positions))
    examples = _read(path, data, report)
    validation = _read(held_out, data, report) if held_out else []
    _refuse(report.rejected, data, only_measured)
    if held_out is None:
        examples, validation = split(examples, data.validation_split, data.seed)
    # 2. chats to rows
    parts = [_tokenise(part, data, tokenizer, template, report) for part in (examples, validation)]
    _refuse(report.rejected, data, only_measured or not any(parts))
    # 3. rows of the wanted length
    _refuse_long([row for rows in parts for row in rows], data, report.max_length, only_measured)
    train, validation = (_fit(rows, data, report) for rows in parts)
    for left_out in (report.rejected, report.dropped):  # a split has taken them apart
        left_out.sort(key=lambda row: (row.where.rpartition(":")[0], int(row.where.rpartition(":")[2])))
    if not train:
        what = f"no row is left to train on: {len(report.rejected)} rejected, {len(report.dropped)} longer than "
        hint = "see data.max_length, data.bad_rows"
        raise UserError("DATA-023", f"{what}{report.max_length} tokens", where=data.path, hint=hint)
    # 4. figures
    known = {hash(tuple(row.ids)) for row in train}
    report.duplicates = sum(hash(tuple(row.ids)) in known for row in validation)
    report.train, report.validation = Counts.of(train), Counts.of(validation)
    return DataSet(train, validation, report)


def _read(path: Path, data: Data, report: Report) -> list[Example]:
    """Returns the chats of a file; what cannot be used goes to the report. A file without one is an error."""
    examples: list[Example] = []
    rejected: list[Rejected] = []
    came: Counter[str] = Counter()
    for record in records(path):
        try:
            if record.problem:
                raise ValueError(record.problem)
            name = detect(record.value) if data.format == "auto" else data.format
            examples.append(Example(with_system(FORMATS[name](record.value), data.system), record.where))
            report.unread.update(UNREAD[name](record.value))
        except ValueError as error:
            rejected.append(Rejected(record.where, str(error)))
            came.update(list(record.value) if isinstance(record.value, dict) else ())
    if not examples:
        hint = f"a row is {SHAPES}" + (f"; the rows have the keys {told(came)}" if came else "")
        what = f"none of its rows can be used; {len(rejected)} bad rows:\n{_listed(rejected)}"
        raise UserError("DATA-020", what if rejected else "there are no rows in it", where=str(path), hint=hint)
    report.rejected += rejected
    return examples


def _refuse(rejected: list[Rejected], data: Data, must_stay: bool) -> None:
    if rejected and data.bad_rows == "error":
        hint = f"{len(rejected)} bad rows; put them right" + (
            "" if must_stay else ", or leave them out with data.bad_rows skip"
        )
        what = _listed(rejected).removeprefix(f"{rejected[0].where}: ")
        raise UserError("DATA-021", what, where=rejected[0].where, hint=hint)


def _listed(rejected: list[Rejected]) -> str:
    """Returns a line for each of the first rows, and how many more there are."""
    more = [f"... and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
    return "\n".join([*(f"{bad.where}: {bad.reason}" for bad in rejected[:SHOWN]), *more])


def _tokenise(
    examples: list[Example], data: Data, tokenizer: Tokenizer, template: ChatTemplate, report: Report
) -> list[Row]:
    """Returns the rows of the chats, however long; what cannot be used goes to the report."""
    end = tokenizer.token_id(template.end_of_turn or tokenizer.eos)
    too_long = report.dropped if data.overlong == "drop" else report.rejected
    most = math.inf if data.overlong == "split" else max(HUGE, report.max_length * tokenizer.longest_token)
    rows: list[Row] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, rendered, encoded in _encoded(chunk, tokenizer, template, report.rejected, too_long, most):
            trained, straddles = mask(encoded, rendered)
            if not any(trained):
                report.rejected.append(Rejected(example.where, "nothing in it is trained: it has no answer to learn"))
                continue
            ended = encoded.ids[len(trained) - 1 - trained[::-1].index(True)] == end
            if not data.mask_prompt:
                trained = [False, *[True] * (len(encoded.ids) - 1)]
            report.straddling += straddles
            if rendered.difference:
                report.unlike.append(example.where)
                report.difference = report.difference or rendered.difference
            rows.append(Row(encoded.ids, trained, trained.index(True), example.where, example.turns, ended))
    return rows


def _encoded(
    examples: list[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rejected: list[Rejected],
    too_long: list[Rejected],
    most: float,
) -> Iterator[tuple[Example, Rendered, Encoded]]:
    """Yields each chat with its text and its tokens; names the others in one of the lists.

    A text of more than `most` characters is too long whatever its tokens are, which may need a gigabyte.
    """
    usable = []
    found = template.spans_of([example.turns for example in examples], [example.where for example in examples])
    for example, rendered in zip(examples, found, strict=True):
        if isinstance(rendered, ValueError):
            (too_long if isinstance(rendered, TooLong) else rejected).append(Rejected(example.where, str(rendered)))
        elif len(rendered.text) > most:
            what = f"its {len(rendered.text):,} characters are more than a row's tokens can hold"
            too_long.append(Rejected(example.where, what))
        else:
            usable.append((example, rendered))
    texts, plain = [rendered.text for _, rendered in usable], [rendered.plain for _, rendered in usable]
    try:
        tokens: list[Encoded] = tokenizer.encode_batch(texts, plain)
    except ValueError:  # one of them: find it
        for example, rendered in usable:
            try:
                yield example, rendered, tokenizer.encode_batch([rendered.text], [rendered.plain])[0]
            except ValueError as error:
                rejected.append(Rejected(example.where, str(error)))
        return
    for (example, rendered), encoded in zip(usable, tokens, strict=True):
        yield example, rendered, encoded


def mask(encoded: Encoded, rendered: Rendered) -> tuple[list[bool], bool]:
    """Returns what is trained: the tokens that share a character with a span; and whether one reaches out of its span.

    A token without characters (a byte of a character whose last byte has them all) belongs where it stands.
    """
    trained, straddles = [False] * len(encoded.ids), False
    spans = iter(rendered.trained)
    begin, stop = next(spans, (0, 0))
    for i, (a, b) in enumerate(encoded.offsets):
        while a >= stop and (following := next(spans, None)):
            begin, stop = following
        if a < stop and (begin < b or (a == b == begin)):
            trained[i] = i > 0
            straddles |= a < begin
    return trained, straddles


def _refuse_long(rows: list[Row], data: Data, limit: int, must_stay: bool) -> None:
    if data.overlong != "error":
        return
    long = [row for row in rows if len(row.ids) > limit]
    if long:
        named = ", ".join(f"{row.source} ({len(row.ids):,})" for row in long[:SHOWN])
        more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        what = f"{len(long)} rows are longer than {limit:,} tokens: {named}{more}"
        hint = "raise data.max_length as far as the model reaches, or choose data.overlong drop or split"
        hint = "the model reaches no further; take them out of the file" if must_stay else hint
        raise UserError("DATA-022", what, where=data.path, hint=hint)


def _fit(rows: list[Row], data: Data, report: Report) -> list[Row]:
    """Returns the rows with the over-long ones left out or cut up."""
    kept = []
    for row in rows:
        if len(row.ids) <= report.max_length:
            kept.append(row)
        elif data.overlong == "drop":
            what = f"{len(row.ids):,} tokens, of at most {report.max_length:,}"
            report.dropped.append(Rejected(row.source, what))
        else:
            pieces = cut(row, report.max_length)
            useful = [piece for piece in pieces if any(piece.trained)]
            report.split_rows += 1
            report.split_pieces += len(useful)
            report.empty_pieces += len(pieces) - len(useful)
            kept += useful
    return kept


def cut(row: Row, length: int) -> list[Row]:
    """Returns pieces of at most `length` tokens; each begins with the last token before it, to lose no label."""
    pieces = []
    last = len(row.trained) - 1 - row.trained[::-1].index(True)
    for start in range(0, len(row.ids) - 1, length - 1):
        trained = [False, *row.trained[start + 1 : start + length]]
        prompt = trained.index(True) if True in trained else len(trained)
        ended = row.ended and start < last < start + length
        pieces.append(Row(row.ids[start : start + length], trained, prompt, row.source, row.turns, ended))
    return pieces


def show(row: Row, tokenizer: Tokenizer, color: bool) -> str:
    """Returns the text of a row with its trained tokens marked: green on a terminal, else in [brackets]."""
    before, after = (GREEN, PLAIN) if color else ("[", "]")
    parts, position, done = [], 0, ""
    for trained, group in groupby(row.trained):
        position += len(list(group))
        text = tokenizer.decode(row.ids[:position], skip_special=False)
        # what is not to be printed (a row could hold codes that steer the terminal) is spelled out
        piece = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text[len(done) :])
        parts.append(f"{before}{piece}{after}" if trained else piece)
        done = text
    return "".join(parts)
