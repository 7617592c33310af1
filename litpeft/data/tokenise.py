"""Rows of a data set as tokens with the mask of what is trained, and a report of what became of every row."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np

from litpeft.core.errors import ConfigError, DataError, counted, some
from litpeft.data.cache import RowCache
from litpeft.data.chats import Chats, Example, refuse
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.kept import judged
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Counts, Report
from litpeft.data.rows import Row, cut
from litpeft.data.sandbox import TooLong
from litpeft.data.settings import Data
from litpeft.data.sources import Source, find, repeated, split
from litpeft.data.store import Descriptor, Rows, RowWriter
from litpeft.data.templates import ChatTemplate, Rendered
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Encoded

CHUNK = 1000  # rows that are encoded together
HUGE = 1 << 23  # characters


@dataclass
class DataSet:
    """Rows to train on, held-out rows, and the report on both."""

    train: Rows
    validation: Rows
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
    pairs: bool = False,
) -> DataSet:
    """Returns the data set of the settings, ready to train on.

    Where the rows are `only_measured`, none may be left out or cut, and errors do not suggest it. Every row's chat
    begins with those of `shots`, which are not trained. With `pairs` rows have their rejected answers, too.
    """
    sources, held_out = find(data.path, data.validation_path, data.prefix)
    if held_out and data.validation_split not in (0, Data.validation_split):
        named = some([file.shown for file in held_out])
        what, hint = f"{data.validation_split} is of no use: the rows of {named} are held out", "leave it out"
        hint += "" if data.validation_path else f", or name {sources[0]} as {data.prefix}path instead of its folder"
        raise ConfigError(what, where=f"{data.prefix}validation_split", hint=hint)
    report = Report(template.name, min(data.max_length, max_positions), pairs=pairs)
    chats = Chats(data, report, only_measured, shots, pairs=pairs)
    files = [*sources, *held_out]
    cache = RowCache(data if not shots else replace(data, cache=False), files, len(held_out), template, report)
    if found := cache.load():
        rows, chats.count, report = found
    else:
        with tempfile.TemporaryFile() as handle:
            writer = RowWriter(handle)
            Tokeniser(chats, tokenizer, template).write(chats.read(files), writer)
            rows = Rows(Descriptor(handle), writer.index)
            cache.save(writer, writer.index, chats.count, report)
    return chosen_rows(rows, sources, bool(held_out), chats.count, data, report)


def chosen_rows(rows: Rows, sources: Sequence[Source], apart: bool, chats: int, data: Data, report: Report) -> DataSet:
    """Returns the rows to train on, as often as their files' weights say, and those held out.

    Those held out are of files after the `sources`, if they are `apart`; else a part of all `chats`.
    """
    is_held_out = rows.column("file") >= len(sources)
    if not apart:
        is_held_out = split(chats, data.validation_split, data.seed)[rows.column("example")]
    train, validation = rows.where(~is_held_out), rows.where(is_held_out)
    if not train:
        what = f"no row is left to train on: {len(report.rejected)} rejected"
        what += f", {len(report.dropped)} longer than {report.max_length} tokens" if report.dropped else ""
        what += f"; {report.rejected[0].where}: {report.rejected[0].reason}" if report.rejected else ""
        advice = [f"raise {data.prefix}max_length, or say {data.prefix}overlong split"] if report.dropped else []
        advice += ["put the rejected rows right, or take another template"] if report.rejected else []
        raise DataError(what, where=data.named, hint="; ".join(advice))
    known, held_out = np.unique(train.column("hash")), validation.column("hash")
    report.duplicates = int((known[np.searchsorted(known[:-1], held_out)] == held_out).sum())
    report.repeated = len(train) - len(known)
    if any(source.weight != 1 for source in sources):
        weights = np.array([source.weight for source in sources])[train.column("file")]
        begins = np.flatnonzero(np.diff(weights, prepend=0))  # of rows that follow each other and have one weight
        groups = zip(weights[begins], np.diff(begins, append=len(train)), strict=True)
        times = [repeated(int(count), float(weight), data.seed) for weight, count in groups]
        train = train.where(np.repeat(np.arange(len(train)), np.concatenate(times)))
    report.train, report.validation = Counts.of(train), Counts.of(validation)
    return DataSet(train, validation, report)


class Tokeniser:
    """Turns chats into rows; what becomes of those that cannot be rows goes to the report."""

    def __init__(self, chats: Chats, tokenizer: Tokenizer, template: ChatTemplate):
        self.chats, self.tokenizer, self.template = chats, tokenizer, template
        self.data, self.report = chats.data, chats.report
        self.refused: list[Rejected] = []  # chats that cannot be rows
        self.long: list[str] = []  # rows that are too long, where that is an error
        self._end = tokenizer.token_id(template.end_of_turn or tokenizer.eos)
        self._end_of_text = tokenizer.token_id(tokenizer.eos) if tokenizer.eos else self._end
        longest = max(map(len, tokenizer.backend.ids))  # characters of a token
        self._most = math.inf if self.data.overlong == "split" else max(HUGE, self.report.max_length * longest)

    def write(self, chats: Iterable[Example], writer: RowWriter) -> None:
        """Writes the rows of chats; raises for those that cannot be used or are too long, if the settings say so."""
        data, report, must_stay = self.data, self.report, self.chats.only_measured
        found = False
        rows = self.rows(self._wanted(chats))
        for example, row in self._paired(rows) if self.chats.pairs else rows:
            found = True
            if pieces := self.fit(row):
                writer.add(pieces, example.number, example.file)
                if row.weights is not None:
                    report.weights.add(weight for weight in row.weights if weight)
        refuse(report.rejected, data, must_stay)
        report.rejected += self.refused
        self.refused.clear()
        refuse(report.rejected, data, must_stay or not found)
        self._refuse_long(must_stay)
        for left_out in (report.rejected, report.dropped):
            left_out.sort(key=lambda row: (row.where.rpartition(":")[0], int(row.where.rpartition(":")[2])))

    def _paired(self, rows: Iterable[tuple[Example, Row]]) -> Iterator[tuple[Example, Row]]:
        """Yields the chats of chosen answers with the rows of both, and notes each place that is left out once."""
        for _, group in groupby(rows, key=lambda one: one[0].number):
            answers: tuple[list, list] = [], []
            for example, row in group:
                answers[example.worse].append((example, row))
            chosen, rejected = answers
            if max(map(len, answers)) > 1:
                what = f"{self.data.prefix}thinking keep makes several rows of one of its answers: take drop"
                self.refused.append(Rejected(chosen[0][1].source if chosen else rejected[0][1].source, what))
            elif chosen and rejected:
                (example, better), (_, worse) = *chosen, *rejected
                if better.ids == worse.ids:
                    self.refused.append(Rejected(better.source, "chosen and rejected are the same tokens"))
                else:
                    yield example, replace(better, rejected=worse, ended=better.ended and worse.ended)
        for left_out in (self.refused, self.report.dropped):
            left_out[:] = {bad.where: bad for bad in left_out}.values()

    def _wanted(self, chats: Iterable[Example]) -> Iterator[Example]:
        """Yields chats up to a row that is an error: after it, only the other errors are of interest."""
        return (chat for chat in chats if self.data.bad_rows == "skip" or not self.report.rejected)

    def rows(self, chats: Iterable[Example]) -> Iterator[tuple[Example, Row]]:
        """Yields chats with their rows, of any length; while some are encoded, the next ones are rendered."""
        chats = iter(chats)
        with ThreadPoolExecutor(1) as encoder:
            rendered, job = [], encoder.submit(self._encoded, [])
            while chunk := list(islice(chats, CHUNK)):
                following = self._rendered(chunk)
                next_job = encoder.submit(self._encoded, following)
                yield from self._made(rendered, job.result())
                rendered, job = following, next_job
            yield from self._made(rendered, job.result())

    def _made(
        self, rendered: Sequence[tuple[Example, Rendered]], found: Sequence[Encoded | ValueError]
    ) -> Iterator[tuple[Example, Row]]:
        for (chat, text), encoded in zip(rendered, found, strict=True):
            if isinstance(encoded, ValueError):
                self.refused.append(Rejected(chat.where, str(encoded)))
            elif (row := self._row(chat, text, encoded)) is not None:
                yield chat, row

    def _rendered(self, chats: Sequence[Example]) -> list[tuple[Example, Rendered]]:
        """Returns the texts of chats.

        A text of more characters than a row's tokens can hold is too long; encoding it could take a gigabyte.
        """
        usable = []
        too_long = self.report.dropped if self.data.overlong == "drop" else self.refused
        found = self.template.spans_of([chat.turns for chat in chats], [chat.where for chat in chats])
        option = f"{self.data.prefix}thinking"
        for chat, text in judged(chats, found, self.template, self.data.thinking, self.report.thoughts, option):
            if isinstance(text, ValueError):
                (too_long if isinstance(text, TooLong) else self.refused).append(Rejected(chat.where, str(text)))
            elif len(text.text) > self._most:
                what = f"its {len(text.text):,} characters are more than a row's tokens can hold"
                too_long.append(Rejected(chat.where, what))
            else:
                usable.append((chat, text))
        return usable

    def _encoded(self, rendered: Sequence[tuple[Example, Rendered]]) -> list[Encoded | ValueError]:
        """Returns the tokens of texts, or why one cannot be encoded."""
        encode = self.tokenizer.encode_batch
        texts, literal = [text.text for _, text in rendered], [text.literal for _, text in rendered]
        try:
            return encode(texts, literal)
        except ValueError:  # find the text that cannot be encoded
            found: list[Encoded | ValueError] = []
            for text, spans in zip(texts, literal, strict=True):
                try:
                    found += encode([text], [spans])
                except ValueError as error:
                    found.append(error)
            return found

    def _row(self, chat: Example, text: Rendered, encoded: Encoded) -> Row | None:
        """Returns a chat as a row; notes in the report what is unusual about it."""
        trained, straddles = mask(encoded, text)
        if True not in trained:
            self.refused.append(Rejected(chat.where, "nothing in it is trained: it has no answer to learn"))
            return None
        last = encoded.ids[len(trained) - 1 - trained[::-1].index(True)]
        ended = last == (self._end_of_text if chat.turns[0].role == PLAIN else self._end)
        if not self.data.mask_prompt:
            trained = [False, *[True] * (len(encoded.ids) - 1)]
        self.report.straddling += straddles
        if text.difference and not chat.worse:
            self.report.unlike.append(chat.where)
            self.report.difference = self.report.difference or text.difference
        weighted = any(turn.weight != 1 for turn in chat.turns)
        weights = token_weights(encoded, text, chat.turns, trained) if weighted else None
        return Row(encoded.ids, trained, trained.index(True), chat.where, chat.turns, ended, weights)

    def fit(self, row: Row) -> list[Row]:
        """Returns a row, or its pieces if it is too long, as data.overlong says; documents are split by default."""
        report, tokens = self.report, max(len(one.ids) for one in row.documents)
        if tokens <= report.max_length:
            return [row]
        if self.data.overlong == "error" and row.turns[0].role != PLAIN:
            self.long.append(f"{row.source} ({tokens:,})")
            return []
        if self.data.overlong == "drop":
            report.dropped.append(Rejected(row.source, f"{tokens:,} tokens, of at most {report.max_length:,}"))
            report.lost += sum(sum(one.trained) for one in row.documents)
            return []
        pieces = cut(row, report.max_length)
        useful = [piece for piece in pieces if any(piece.trained)]
        report.split_rows += 1
        report.split_pieces += len(useful)
        report.empty_pieces += len(pieces) - len(useful)
        return useful

    def _refuse_long(self, must_stay: bool) -> None:
        if not self.long:
            return
        prefix, limit = self.data.prefix, self.report.max_length
        what = f"{counted(len(self.long), 'row')} longer than {limit:,} tokens: {some(self.long)}"
        hint = f"raise {prefix}max_length as far as the model reaches, or choose {prefix}overlong drop or split"
        hint = "the model reaches no further; take out of the file what is longer" if must_stay else hint
        raise DataError(what, where=self.data.named, hint=hint)


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


def token_weights(
    encoded: Encoded, rendered: Rendered, turns: Sequence[Turn], trained: Sequence[bool]
) -> list[float] | None:
    """Returns the weight of each token in the loss, 0 if it is not `trained`; None if all of these have the weight 1.

    A token of an answer has the weight of its turn, another one, if prompts are trained, that of the row.
    """
    answers = [turn.weight for turn in turns if turn.trained]
    rest = next((turn.weight for turn in reversed(turns) if not turn.trained), 1.0)
    weights = [rest * one for one in trained]
    for weight in {*answers}:
        spans = [span for span, own in zip(rendered.trained, answers, strict=True) if own == weight]
        inside, _ = mask(encoded, replace(rendered, trained=spans))
        weights = [weight if one else before for one, before in zip(inside, weights, strict=True)]
    return None if all(weight in (0, 1) for weight in weights) else weights
