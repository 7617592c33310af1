"""Files of rows as chats, with a report of the rows that cannot be used."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from shlex import quote

from litpeft.core.errors import DataError, counted
from litpeft.data.formats import EXAMPLES, chosen, preference
from litpeft.data.formats.keys import listed
from litpeft.data.formats.turn import Turn
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Report
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.sources import Source
from litpeft.data.templates import with_system

SHOWN = 5  # rows that an error names
PAIR = json.dumps(preference.FORMAT.example)
NO_PAIR = "all rows have to be pairs of answers (preference.loss), and this one is of the format {}"
ASKED = "question", "prompt", "instruction", "query", "problem", "input", "user", "human", "request", "source", "ask"
ANSWERED = "answer", "response", "reply", "output", "completion", "solution", "target", "assistant", "summary"


@dataclass(frozen=True, slots=True)
class Example:
    """A chat and the line it comes from."""

    turns: list[Turn]
    where: str
    number: int  # in the order in which chats are read
    file: int  # number of its file
    worse: bool = False  # it has the rejected answer of the pair whose chosen one is in the chat before


@dataclass
class Chats:
    """Reads files as chats; rows that cannot be used go to the report. `count` are the chats so far.

    Where the rows are `only_measured`, errors do not suggest to leave one out. Every chat begins with those of `shots`.
    With `pairs` all rows have to be pairs of answers, and each is two chats that follow each other.
    """

    data: Data
    report: Report
    only_measured: bool = False
    shots: Sequence[Row] = ()
    count: int = 0
    pairs: bool = False

    def read(self, sources: Sequence[Source]) -> Iterator[Example]:
        """Yields the chats of files. A file without a chat is an error."""
        for file, source in enumerate(sources):
            before = self.count
            yield from self._of(file, source)
            if len(sources) > 1 or source.weight != 1 or source.address:
                seen = "" if source.weight == 1 else f", each {source.weight:g} times an epoch"
                licence = f"; licence: {source.preset.licence}" if source.preset else ""
                self.report.files[str(source)] = f"{counted(self.count - before, 'row')}{seen}{licence}"

    def _of(self, file: int, source: Source) -> Iterator[Example]:
        data, report = self.data, self.report
        before, rejected = self.count, len(report.rejected)
        came: list[dict[str, object]] = []
        own = source.preset.columns if source.preset and data.format == "auto" else None
        choose = chosen(data.format, data.columns or own)
        for record in source.records(data.documents):
            form = None
            try:
                if record.problem:
                    raise ValueError(record.problem)
                name, form = choose(record.value)
                if self.pairs and form is not preference.FORMAT:
                    raise DataError(NO_PAIR.format(name), where=record.where, hint=f"a pair is {PAIR}")
                chats = preference.both(record.value) if self.pairs else [form.turns(record.value)]
                chats = [with_system(turns, data.system) for turns in chats]
                unread = preference.unread(record.value) if self.pairs else form.unread(record.value)
            except ValueError as error:
                report.rejected.append(Rejected(record.where, str(error)))
                is_row = not record.problem and isinstance(record.value, dict) and record.value
                if is_row and (form is None or not form.fits(record.value)):  # its keys are to blame, not a value
                    came.append(dict.fromkeys(record.value) if came else record.value)
                continue
            report.formats[name] += 1
            report.unread.update(unread)
            self.count += 1
            for number, turns in enumerate(chats):
                yield Example(after_shots(turns, self.shots), record.where, self.count - 1, file, number > 0)
        if self.count == before:
            raise self._nothing(source, report.rejected[rejected:], came)

    def _nothing(self, source: Source, bad: list[Rejected], came: list[dict[str, object]]) -> DataError:
        hint = f"a row is {EXAMPLES}"
        if came and not self.data.columns:
            map_them = mapping(came[0], "" if self.only_measured else self.data.prefix)
            named = listed(Counter(key for row in came for key in row))
            hint += f"; the rows have the keys {named}; to map them: {map_them}"
        what = f"none of its rows can be used; {counted(len(bad), 'bad row')}:\n{_listed(bad)}"
        return DataError(what if bad else "there are no rows in it", where=source.shown, hint=hint)


def mapping(row: dict[str, object], prefix: str) -> str:
    """Returns the option that maps a row's keys, to be typed: those that by their names are likely to be meant."""
    chats = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if chats or len(row) < 2:
        parts = {"messages": chats[0]} if chats else {"text": next(iter(row))}
    else:
        answer = likely(list(row), ANSWERED)
        asked = likely([key for key in row if key != answer], ASKED)
        asked = asked or next(key for key in row if key != answer)
        parts = {"user": asked, "assistant": answer or next(key for key in row if key != asked)}
    return f"--{prefix}columns {quote(json.dumps(parts, ensure_ascii=False))}"


def likely(names: list[str], words: Sequence[str]) -> str | None:
    """Returns the first of the names that is one of the words, or else has one in it."""
    low: dict[str, str] = {}
    for name in names:
        low.setdefault(name.lower(), name)
    found = (low[word] for word in words if word in low)
    return next(found, None) or next((low[name] for word in words for name in low if word in name), None)


def after_shots(turns: list[Turn], shots: Sequence[Row]) -> list[Turn]:
    """Returns a chat with those of the shots before its first turn but the system message; theirs are left out."""
    if not shots:
        return turns
    before = [replace(turn, train=False) for shot in shots for turn in shot.turns if turn.role != "system"]
    first = 1 if turns[0].role == "system" else 0
    return [*turns[:first], *before, *turns[first:]]


def refuse(rejected: list[Rejected], data: Data, must_stay: bool) -> None:
    if rejected and data.bad_rows == "error":
        leave_out = "" if must_stay else f", or to leave out with {data.prefix}bad_rows skip"
        hint = f"{counted(len(rejected), 'bad row')} to put right{leave_out}"
        raise DataError(_listed(rejected).removeprefix(f"{rejected[0].where}: "), where=rejected[0].where, hint=hint)


def _listed(rejected: list[Rejected]) -> str:
    """Returns a line for each of the first rows, and the number of the others."""
    more = [f"... and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
    return "\n".join([*(f"{bad.where}: {bad.reason}" for bad in rejected[:SHOWN]), *more])
