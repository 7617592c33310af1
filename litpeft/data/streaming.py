"""Rows that are read, rendered and tokenised while the run trains on them: for files too large to be read before it.

The chats of the files, in order, are cut into windows of data.window. The rows of a window are shuffled, and steps are
made of them one after the other, while a thread tokenises the next window. All of it follows from the files, the seed
and the step, so that a resumed run only needs to know how many rows each window gave: it skips whole windows without
tokenising them.
"""

import hashlib
import random
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np

from litpeft.core.checksums import file_sha256
from litpeft.core.errors import ConfigError, DataError, some
from litpeft.data.ahead import one_ahead, while_wanted
from litpeft.data.chats import Chats, refuse
from litpeft.data.report import Counts, Report
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.sources import Source, find
from litpeft.data.store import Descriptor, Rows, RowWriter
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, Tokeniser, load_dataset

SAMPLES, SAMPLE = 64, 1 << 20  # parts of a large file that stand for it, and their bytes
OF_THE_FIRST = (
    *("formats", "unread", "thoughts", "weights", "straddling", "unlike", "difference"),
    *("split_rows", "split_pieces", "empty_pieces"),
)
Windows = list[list[int]]  # by epoch: the rows of each window


class Window(NamedTuple):
    """Shuffled rows, and what became of the others."""

    epoch: int
    rows: Rows | None  # None: the epoch has ended
    report: Report


@dataclass
class Stream:
    """The rows of files, window by window."""

    data: Data
    sources: Sequence[Source]
    template: ChatTemplate
    report: Report  # of all that was trained on so far
    first: Window | None = None  # which is known before the training begins

    def __post_init__(self) -> None:
        self.noted = {bad.where for bad in (*self.report.rejected, *self.report.dropped)}

    def windows(self, epoch: int, first: int = 0, stop: Event | None = None) -> Generator[Window, None, Report]:
        """Yields the windows of an epoch, from one on, and returns the report on bad rows after the last one.

        Raises Stopped once `stop` is set.
        """
        report = Report(self.template.name, self.report.max_length)
        chats = Chats(self.data, report)
        tokeniser = Tokeniser(chats, self.template.tokenizer, self.template)
        examples = while_wanted(chats.read(self.sources), stop or Event())
        deque(islice(examples, first * self.data.window), maxlen=0)
        while window := list(islice(examples, self.data.window)):
            with tempfile.TemporaryFile() as handle:
                writer = RowWriter(handle)
                tokeniser.write(while_wanted(window, stop or Event()), writer)
                rows = Rows(Descriptor(handle), writer.index)
            order = np.arange(len(rows))
            random.Random(f"{self.data.seed} {epoch} {first}").shuffle(order)
            yield Window(epoch, rows.where(order), deepcopy(report))
            for left_out in (report.unlike, report.rejected, report.dropped):
                left_out.clear()
            first += 1
        refuse(report.rejected, self.data, must_stay=False)
        return report

    def _endless(self, epoch: int, first: int, stop: Event) -> Iterator[Window]:
        """Yields the windows of this epoch, from one on, and of all later ones; after each epoch one without rows."""
        if self.first is not None and epoch == first == 0:
            yield self.first
            first = 1
        while True:
            rest = yield from self.windows(epoch, first, stop)
            yield Window(epoch, None, rest)
            epoch, first = epoch + 1, 0

    def note(self, report: Report) -> None:
        """Moves rows that are left out, and were not before, to the report on all; of the first window, all else."""
        if not self.report.formats:
            vars(self.report).update({name: getattr(report, name) for name in OF_THE_FIRST})
        for found, noted in ((report.rejected, self.report.rejected), (report.dropped, self.report.dropped)):
            noted += [bad for bad in found if bad.where not in self.noted]
            self.noted |= {bad.where for bad in found}

    def steps(self, batch_size: int, step: int, known: Windows) -> Iterator[tuple[int, list[Row]]]:
        """Yields the epoch and the rows of optimizer step `step` (from 0) and of all after it, without an end.

        `known` are the windows that were read before; those that are read now are added.
        """
        if known:
            self.first = None  # a run that goes on reads it again
        else:
            known.append([])
        epoch = number = 0
        while epoch + 1 < len(known):  # whole epochs are skipped
            step -= -(-sum(known[epoch]) // batch_size)
            epoch += 1
        skipped = step * batch_size
        while number < len(known[epoch]) and skipped >= known[epoch][number]:  # and whole windows
            skipped -= known[epoch][number]
            number += 1
        rows, stop = [], Event()
        with closing(one_ahead(self._endless(epoch, number, stop), stop)) as windows:
            for epoch, found, report in windows:
                self.note(report)
                if found is None:
                    if rows:
                        yield epoch, rows
                    if not sum(known[epoch]):
                        raise DataError("no row of the files can be trained on", where=self.data.named)
                    known.append([])
                    rows, skipped, number = [], 0, 0
                    continue
                self._count(number, len(found), known[epoch])
                for row in found[skipped:]:
                    rows.append(row)
                    if len(rows) == batch_size:
                        yield epoch, rows
                        rows = []
                skipped, number = 0, number + 1

    def _count(self, number: int, rows: int, counts: list[int]) -> None:
        """Notes the rows of a window in `counts`; raises if there were as many others when the run read it before."""
        if number == len(counts):
            counts.append(rows)
        elif counts[number] != rows:
            what = f"window {number + 1} has {rows:,} rows, and had {counts[number]:,} when the run read it"
            raise DataError(what, where=self.data.named, hint="the files have changed since: take another out")

    def sha256(self, held_out: Sequence[Row]) -> str:
        """Returns what stands for the files, of which large ones are read in part, and for held-out rows."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(b"".join(_samples(source.path)))
        for row in held_out:
            digest.update(row.content)
        return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    starts = range(0, size, SAMPLE) if size <= SAMPLES * SAMPLE else np.linspace(0, size - SAMPLE, SAMPLES).astype(int)
    for start in starts:
        yield file_sha256(path, int(start), min(size, int(start) + SAMPLE)).encode()


def load_stream(data: Data, template: ChatTemplate, max_positions: int) -> tuple[DataSet, Stream]:
    """Returns the first window of the rows to train on, with the held-out rows, and the stream of all of them."""
    sources, held_out = find(data.path, data.validation_path)
    if not held_out and data.validation_split:
        hint = "name a file of held-out rows with data.validation_path, or set it to 0"
        raise ConfigError("a stream has no end to hold rows out of", where="data.validation_split", hint=hint)
    if packed := [str(source.path) for source in sources if not source.path.is_file()]:
        raise ConfigError(f"{some(packed)} cannot be read twice", where="data.streaming", hint="write it to a file")
    report = Report(template.name, min(data.max_length, max_positions))
    stream = Stream(data, sources, template, report)
    stream.first = next(stream.windows(0), None)
    if stream.first is None or not stream.first.rows:
        raise DataError("no row of the first window can be trained on", where=data.named)
    stream.note(stream.first.report)
    first = stream.first.rows
    report.train, validation = Counts.of(first), first[:0]
    if held_out:
        apart = replace(data, path=tuple(map(str, held_out)), validation_path=None, validation_split=0.0)
        loaded = load_dataset(apart, template.tokenizer, template, max_positions)
        validation, report.validation = loaded.train, loaded.report.train
        report.rejected += loaded.report.rejected
        report.dropped += loaded.report.dropped
    report.streamed = True
    return DataSet(first, validation, report), stream
