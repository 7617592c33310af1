"""Files of rows as chats, with a report of the rows that cannot be used."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from shlex import quote

from litpeft.core.errors import DataError, counted
from litpeft.data.formats import EXAMPLES, chosen
from litpeft.data.formats.keys import listed
from litpeft.data.formats.turn import Turn
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Report
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.sources import Source
from litpeft.data.templates import with_system

SHOWN = 5  # rows that an error names


@dataclass(frozen=True, slots=True)
class Example:
    """A chat and the line it comes from."""

    turns: list[Turn]
    where: str
    number: int  # in the order in which chats are read
    file: int  # number of its file


@dataclass
class Chats:
    """Reads files as chats; rows that cannot be used go to the report. `count` are the chats so far.

    Where the rows are `only_measured`, errors do not suggest to leave one out. Every chat begins with those of `shots`.
    """

    data: Data
    report: Report
    only_measured: bool = False
    shots: Sequence[Row] = ()
    count: int = 0

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
        came: Counter[str] = Counter()
        own = source.preset.columns if source.preset and data.format == "auto" else None
        choose = chosen(data.format, data.columns or own)
        for record in source.records(data.documents):
            try:
                if record.problem:
                    raise ValueError(record.problem)
                name, form = choose(record.value)
                turns = with_system(form.turns(record.value), data.system)
                unread = form.unread(record.value)
            except ValueError as error:
                report.rejected.append(Rejected(record.where, str(error)))
                came.update(list(record.value) if isinstance(record.value, dict) else ())
                continue
            report.formats[name] += 1
            report.unread.update(unread)
            self.count += 1
            yield Example(after_shots(turns, self.shots), record.where, self.count - 1, file)
        if self.count == before:
            raise self._nothing(source, report.rejected[rejected:], came)

    def _nothing(self, source: Source, bad: list[Rejected], came: Counter[str]) -> DataError:
        hint = f"a row is {EXAMPLES}"
        if came and not self.data.columns:
            map_them = mapping(list(came), "" if self.only_measured else self.data.prefix)
            hint += f"; the rows have the keys {listed(came)}; to map them: {map_them}"
        what = f"none of its rows can be used; {counted(len(bad), 'bad row')}:\n{_listed(bad)}"
        return DataError(what if bad else "there are no rows in it", where=source.shown, hint=hint)


def mapping(keys: list[str], prefix: str) -> str:
    """Returns the option that maps a row's keys, to be typed: with the first two of them, which may be others."""
    parts = dict(zip(("user", "assistant"), keys, strict=False)) if len(keys) > 1 else {"text": keys[0]}
    return f"--{prefix}columns {quote(json.dumps(parts, ensure_ascii=False))}"


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
