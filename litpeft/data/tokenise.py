"""Rows of a data set as tokens with the mask of what is trained, and a report of what became of every row."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from shlex import quote

from litpeft.core.errors import ConfigError, DataError, counted, some
from litpeft.data.formats import EXAMPLES, chosen
from litpeft.data.formats.keys import listed
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.readers import records, shown
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Counts, Report
from litpeft.data.rows import Row, cut
from litpeft.data.sandbox import TooLong
from litpeft.data.settings import Data
from litpeft.data.sources import Source, find, repeated, split
from litpeft.data.templates import ChatTemplate, Rendered, with_system
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Encoded

CHUNK = 1000  # rows that are encoded together
SHOWN = 5  # rows that an error names
HUGE = 1 << 23  # characters


@dataclass(frozen=True, slots=True)
class Example:
    """A chat and the line it comes from."""

    turns: list[Turn]
    where: str
    weight: float = 1.0  # of its file


@dataclass
class DataSet:
    """Rows to train on, held-out rows, and the report on both."""

    train: list[Row]
    validation: list[Row]
    report: Report

    @property
    def rejected(self) -> list[Rejected]:
        """Returns all rows that are left out."""
        return [*self.report.rejected, *self.report.dropped]


def load_dataset(
    data: Data,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_positions: int,
    only_measured: bool = False,
    shots: Sequence[Row] = (),
) -> DataSet:
    """Returns the data set of the settings, ready to train on; prints nothing.

    Where the rows are `only_measured`, none may be left out or cut, and errors do not suggest it. Every row's chat
    begins with those of `shots`, which are not trained.
    """
    # 1. files to chats
    sources, held_out = find(data.path, data.validation_path)
    if held_out and data.validation_split not in (0, Data.validation_split):
        named = some([str(file) for file in held_out])
        what, hint = f"{data.validation_split} is of no use: the rows of {named} are held out", "leave it out"
        hint += (
            "" if data.validation_path else f", or name {sources[0].path} as {data.prefix}path instead of its folder"
        )
        raise ConfigError(what, where=f"{data.prefix}validation_split", hint=hint)
    report = Report(Counts.of([]), Counts.of([]), template.name, min(data.max_length, max_positions))
    examples = _read(sources, data, report, only_measured)
    validation = _read([Source(file) for file in held_out], data, report, only_measured)
    _refuse(report.rejected, data, only_measured)
    if shots:
        examples = [replace(example, turns=after_shots(example.turns, shots)) for example in examples]
    if not held_out:
        examples, validation = split(examples, data.validation_split, data.seed)
    # 2. chats to rows
    parts = [_tokenise(part, data, tokenizer, template, report) for part in (examples, validation)]
    _refuse(report.rejected, data, only_measured or not any(parts))
    # 3. rows longer than the limit
    _refuse_long([row for rows in parts for row in rows], data, report.max_length, only_measured)
    train, validation = (_fit(rows, data, report) for rows in parts)
    for left_out in (report.rejected, report.dropped):  # in the files' order, which the split has changed
        left_out.sort(key=lambda row: (row.where.rpartition(":")[0], int(row.where.rpartition(":")[2])))
    if not train:
        what = f"no row is left to train on: {len(report.rejected)} rejected, {len(report.dropped)} longer than "
        what += f"{report.max_length} tokens"
        raise DataError(what, where=data.named, hint=f"see {data.prefix}max_length, {data.prefix}bad_rows")
    # 4. weights and figures
    known = {hash(tuple(row.ids)) for row in train}
    report.duplicates = sum(hash(tuple(row.ids)) in known for row in validation)
    groups = groupby(train, key=lambda row: row.weight)
    train = [row for weight, rows in groups for row in repeated(list(rows), weight, data.seed)]
    report.train, report.validation = Counts.of(train), Counts.of(validation)
    return DataSet(train, validation, report)


def _read(sources: Sequence[Source], data: Data, report: Report, only_measured: bool) -> list[Example]:
    """Returns the chats of files; rows that cannot be used go to the report. A file without a chat is an error."""
    examples: list[Example] = []
    for source in sources:
        found = _read_one(source, data, report, only_measured)
        examples += found
        if len(sources) > 1 or source.weight != 1:
            seen = "" if source.weight == 1 else f", each {source.weight:g} times an epoch"
            report.files[shown(source.path)] = f"{counted(len(found), 'row')}{seen}"
    return examples


def _read_one(source: Source, data: Data, report: Report, only_measured: bool) -> list[Example]:
    examples: list[Example] = []
    rejected: list[Rejected] = []
    came: Counter[str] = Counter()
    choose = chosen(data.format, data.columns)
    for record in records(source.path, data.documents):
        try:
            if record.problem:
                raise ValueError(record.problem)
            name, form = choose(record.value)
            turns = with_system(form.turns(record.value), data.system)
            examples.append(Example(turns, record.where, source.weight))
            report.formats[name] += 1
            report.unread.update(form.unread(record.value))
        except ValueError as error:
            rejected.append(Rejected(record.where, str(error)))
            came.update(list(record.value) if isinstance(record.value, dict) else ())
    if not examples:
        hint = f"a row is {EXAMPLES}"
        if came and not data.columns:
            map_them = mapping(list(came), "" if only_measured else data.prefix)
            hint += f"; the rows have the keys {listed(came)}; to map them: {map_them}"
        what = f"none of its rows can be used; {counted(len(rejected), 'bad row')}:\n{_listed(rejected)}"
        raise DataError(what if rejected else "there are no rows in it", where=shown(source.path), hint=hint)
    report.rejected += rejected
    return examples


def mapping(keys: list[str], prefix: str) -> str:
    """Returns the option that maps a row's keys, to be typed: with the first two of them, which may be others."""
    parts = dict(zip(("user", "assistant"), keys, strict=False)) if len(keys) > 1 else {"text": keys[0]}
    return f"--{prefix}columns {quote(json.dumps(parts, ensure_ascii=False))}"


def after_shots(turns: list[Turn], shots: Sequence[Row]) -> list[Turn]:
    """Returns a chat with those of the shots before its first turn but the system message; theirs are left out."""
    before = [replace(turn, train=False) for shot in shots for turn in shot.turns if turn.role != "system"]
    first = 1 if turns[0].role == "system" else 0
    return [*turns[:first], *before, *turns[first:]]


def _refuse(rejected: list[Rejected], data: Data, must_stay: bool) -> None:
    if rejected and data.bad_rows == "error":
        leave_out = "" if must_stay else f", or to leave out with {data.prefix}bad_rows skip"
        hint = f"{counted(len(rejected), 'bad row')} to put right{leave_out}"
        raise DataError(_listed(rejected).removeprefix(f"{rejected[0].where}: "), where=rejected[0].where, hint=hint)


def _listed(rejected: list[Rejected]) -> str:
    """Returns a line for each of the first rows, and the number of the others."""
    more = [f"... and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
    return "\n".join([*(f"{bad.where}: {bad.reason}" for bad in rejected[:SHOWN]), *more])


def _tokenise(
    examples: list[Example], data: Data, tokenizer: Tokenizer, template: ChatTemplate, report: Report
) -> list[Row]:
    """Returns the chats as rows of any length; those that cannot be used go to the report."""
    end, end_of_text = tokenizer.token_id(template.end_of_turn or tokenizer.eos), tokenizer.token_id(tokenizer.eos)
    longest = max(map(len, tokenizer.backend.ids))  # characters of a token
    too_long = report.dropped if data.overlong == "drop" else report.rejected
    most = math.inf if data.overlong == "split" else max(HUGE, report.max_length * longest)
    rows: list[Row] = []
    numbers = list(range(max(tokenizer.backend.names) + 1))  # all rows share these: an int has 28 bytes
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, rendered, encoded in _encoded(chunk, template, report.rejected, too_long, most):
            trained, straddles = mask(encoded, rendered)
            if not any(trained):
                report.rejected.append(Rejected(example.where, "nothing in it is trained: it has no answer to learn"))
                continue
            last = encoded.ids[len(trained) - 1 - trained[::-1].index(True)]
            ended = last == (end_of_text if example.turns[0].role == PLAIN and tokenizer.eos else end)
            if not data.mask_prompt:
                trained = [False, *[True] * (len(encoded.ids) - 1)]
            report.straddling += straddles
            if rendered.difference:
                report.unlike.append(example.where)
                report.difference = report.difference or rendered.difference
            prompt = trained.index(True)
            ids = [numbers[number] for number in encoded.ids]
            rows.append(Row(ids, trained, prompt, example.where, example.turns, ended, example.weight))
    return rows


def _encoded(
    examples: list[Example], template: ChatTemplate, rejected: list[Rejected], too_long: list[Rejected], most: float
) -> Iterator[tuple[Example, Rendered, Encoded]]:
    """Yields each chat with its text and its tokens; the others go to `rejected` or `too_long`.

    A text of more than `most` characters is too long whatever its tokens are; encoding it could take a gigabyte.
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
    texts, literal = [rendered.text for _, rendered in usable], [rendered.literal for _, rendered in usable]
    encode = template.tokenizer.encode_batch
    try:
        tokens = encode(texts, literal)
    except ValueError:  # find the text that cannot be encoded
        for example, rendered in usable:
            try:
                yield example, rendered, encode([rendered.text], [rendered.literal])[0]
            except ValueError as error:
                rejected.append(Rejected(example.where, str(error)))
        return
    for (example, rendered), encoded in zip(usable, tokens, strict=True):
        yield example, rendered, encoded


def mask(encoded: Encoded, rendered: Rendered) -> tuple[list[bool], bool]:
    """Returns which tokens are trained: those that overlap a span; and whether one of them begins before its span.

    A token without characters (of a character's bytes only the last has its offset) belongs where it stands.
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
    long = [row for row in rows if len(row.ids) > limit and row.turns[0].role != PLAIN]
    if long and data.overlong == "error":
        named = some([f"{row.source} ({len(row.ids):,})" for row in long])
        what = f"{counted(len(long), 'row')} longer than {limit:,} tokens: {named}"
        hint = (
            f"raise {data.prefix}max_length as far as the model reaches, or choose {data.prefix}overlong drop or split"
        )
        hint = "the model reaches no further; take out of the file what is longer" if must_stay else hint
        raise DataError(what, where=data.named, hint=hint)


def _fit(rows: list[Row], data: Data, report: Report) -> list[Row]:
    """Returns the rows with over-long ones left out or split, as data.overlong says; documents are split by default."""
    kept = []
    for row in rows:
        if len(row.ids) <= report.max_length:
            kept.append(row)
        elif data.overlong == "drop":
            report.dropped.append(Rejected(row.source, f"{len(row.ids):,} tokens, of at most {report.max_length:,}"))
        else:
            pieces = cut(row, report.max_length)
            useful = [piece for piece in pieces if any(piece.trained)]
            report.split_rows += 1
            report.split_pieces += len(useful)
            report.empty_pieces += len(pieces) - len(useful)
            kept += useful
    return kept
