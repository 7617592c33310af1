"""What is wrong with rows, before a model learns them: figures, findings with limits, and a clean copy."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from litpeft.core.errors import some
from litpeft.core.folders import atomic_file
from litpeft.data.batches import bin_pack
from litpeft.data.duplicates import first_of_each, nearly_the_same
from litpeft.data.formats.keys import listed
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Weights
from litpeft.data.rows import Row, said
from litpeft.data.sources import Source
from litpeft.data.store import Rows
from litpeft.data.tokenise import DataSet
from litpeft.data.tokenizer import Tokenizer

BARS, WIDTH = 12, 40  # of the histogram


@dataclass
class Finding:
    """Rows with something wrong."""

    name: str
    rows: list[Rejected]
    share: float  # of all rows
    limit: float  # share that is still good

    @property
    def failed(self) -> bool:
        return self.share > self.limit


@dataclass
class Checked:
    """The figures of a data set, and what is wrong with it."""

    files: str
    formats: dict[str, int]
    rows: int  # that can be used
    held_out: int
    tokens: int
    trained: int
    max_length: int
    lengths: list[int]  # tokens of each row
    fill: float  # share of a forward pass of so many tokens that packing fills
    lost: int  # trained tokens in rows longer than max_length
    unread: dict[str, int]
    weights: Weights
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns the report."""
        ordered = sorted(self.lengths)
        middle, most = ordered[len(ordered) // 2], ordered[ceil(0.95 * len(ordered)) - 1]
        lines = [
            f"files       {self.files}",
            f"format      {listed(Counter(self.formats))}",
            f"rows        {self.rows:,} to train on" + (f", {self.held_out:,} held out" if self.held_out else ""),
            f"tokens      {self.tokens:,}, {self.trained:,} trained ({self.trained / self.tokens:.1%})",
            f"length      median {middle:,}; 95% up to {most:,}; longest {ordered[-1]:,} of {self.max_length:,}",
            f"packing     fills {self.fill:.1%} of passes of {self.max_length:,} tokens",
            *histogram(ordered),
        ]
        if self.weights.rows:
            lines.append(f"weights     {self.weights}")
        if self.unread:
            lines.append(f"not read    the keys {listed(Counter(self.unread))}")
        lines += ["", f"{'check':<18}{'rows':>8}{'share':>9}{'limit':>9}"]
        for one in self.findings:
            state = "  FAILED" if one.failed else ""
            lines.append(f"{one.name:<18}{len(one.rows):>8,}{one.share:>9.2%}{one.limit:>9.2%}{state}")
            lines += [f"    {bad.where}: {bad.reason}" for bad in one.rows[:3] if one.failed]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """Returns all figures, and every row that something is wrong with."""
        return asdict(self) | {"failed": [one.name for one in self.findings if one.failed]}


def histogram(lengths: Sequence[int]) -> list[str]:
    """Returns a line for each range of sorted lengths, with a bar as long as there are rows."""
    low, high = lengths[0], lengths[-1]
    step = max(1, -(-(high - low + 1) // BARS))
    counts = [0] * (-(-(high - low + 1) // step))
    for length in lengths:
        counts[(length - low) // step] += 1
    return [
        f"{low + i * step:>7,}-{low + (i + 1) * step - 1:<7,} {'#' * -(-WIDTH * n // max(counts))} {n:,}".rstrip()
        for i, n in enumerate(counts)
    ]


def check(data: DataSet, files: str, max_length: int, tokenizer: Tokenizer, limits: dict[str, float]) -> Checked:
    """Returns what is wrong with rows, which are whole: none may have been cut or left out for its length."""
    report, rows = data.report, data.train
    bad = {name: one.find(data, max_length, tokenizer) for name, one in CHECKS.items()}
    total = len(rows) + len(report.rejected)
    lengths, trained = rows.column("tokens"), rows.column("trained")
    short = lengths[lengths <= max_length]
    bins = len(bin_pack(short.tolist(), max_length))
    return Checked(
        files=files,
        formats=dict(report.formats),
        rows=len(rows),
        held_out=len(data.validation),
        tokens=int(lengths.sum()),
        trained=int(trained.sum()),
        max_length=max_length,
        lengths=lengths.tolist(),
        fill=int(short.sum()) / (bins * max_length) if bins else 0.0,
        lost=int(trained[rows.column("longest") > max_length].sum()),
        unread=dict(report.unread),
        weights=report.weights,
        findings=[
            Finding(name, found, len(found) / total, limits.get(name, CHECKS[name].limit))
            for name, found in bad.items()
        ],
    )


def _unusable(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    return data.report.rejected


def _empty(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    return [bad for bad in data.report.rejected if bad.reason.endswith("is empty")]


def _too_long(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    long = data.train.where((data.train.column("longest") > max_length) & ~data.train.column("plain"))
    rows = [(row.source, max(row.documents, key=lambda one: len(one.ids))) for row in long]
    return [Rejected(where, f"{len(row.ids):,} tokens, {sum(row.trained):,} of them trained") for where, row in rows]


def _no_end(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    endless = data.train.where(~data.train.column("ended"))
    return [Rejected(row.source, "the token that ends its answer is not trained") for row in endless]


def _double_bos(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    twice = [tokenizer.bos_id] * 2
    return [Rejected(row.source, "it begins with two BOS tokens") for row in data.train if row.ids[:2] == twice]


def _duplicate(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    return _repeats(data.train, first_of_each(data.train.column("hash")), "the same as")


def _near_duplicate(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    same = first_of_each(data.train.column("hash"))
    near = nearly_the_same(len(data.train), lambda at: said(data.train[at]))
    return _repeats(data.train, np.where(same < 0, near, -1), "nearly the same as")


def _repeats(rows: Rows, firsts: np.ndarray, what: str) -> list[Rejected]:
    found = np.flatnonzero(firsts >= 0).tolist()
    return [Rejected(rows[at].source, f"{what} {rows[firsts[at]].source}") for at in found]


def _held_out_too(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    hashes, others = data.train.column("hash"), data.validation.column("hash")
    held_out = {one: at for at, one in enumerate(others)}
    found = [(at, held_out[hashes[at]]) for at in np.flatnonzero(np.isin(hashes, others))]
    return [Rejected(data.train[at].source, f"held out as {data.validation[same].source}") for at, same in found]


def _special(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    found = [(row.source, {w for one in row.documents for w in _spelt(one, tokenizer)}) for row in data.train]
    return [Rejected(where, f"it spells {some(sorted(words))}") for where, words in found if words]


def _spelt(row: Row, tokenizer: Tokenizer) -> list[str]:
    return [word for turn in row.turns for word in tokenizer.special_pattern.findall(turn.content)]


def _otherwise(data: DataSet, max_length: int, tokenizer: Tokenizer) -> list[Rejected]:
    return [Rejected(where, data.report.difference) for where in data.report.unlike]


class Kind(NamedTuple):
    """A check of the rows."""

    find: Callable[[DataSet, int, Tokenizer], list[Rejected]]
    limit: float = 0.0  # share of the rows by default at which it fails; 1: it is counted, and never fails


CHECKS = {
    "unusable": Kind(_unusable),
    "empty_answer": Kind(_empty),  # among the unusable ones
    "too_long": Kind(_too_long),
    "no_end": Kind(_no_end),
    "double_bos": Kind(_double_bos),
    "duplicate": Kind(_duplicate, 0.01),
    "near_duplicate": Kind(_near_duplicate, 1.0),
    "held_out_too": Kind(_held_out_too),
    "special_token": Kind(_special, 1.0),
    "begins_otherwise": Kind(_otherwise, 1.0),  # than the prompt that asks for its answer
}


def write_clean(out: Path, sources: Sequence[Source], documents: Any, checked: Checked) -> tuple[int, int]:
    """Writes the rows without a finding whose limit is below 1, as they were, to `out`, the others beside it.

    Returns how many are in each.
    """
    reasons: dict[str, str] = {}
    for one in checked.findings:
        reasons |= {bad.where: bad.reason for bad in one.rows if one.limit < 1 and bad.where not in reasons}
    rejected, left, kept = out.with_suffix(".rejected.jsonl"), [], 0
    with atomic_file(out) as handle:
        for source in sources:
            for record in source.records(documents):
                if record.where in reasons:
                    left.append({"where": record.where, "reason": reasons[record.where], "row": record.value})
                else:
                    handle.write(_line(record.value))
                    kept += 1
    with atomic_file(rejected) as handle:
        handle.writelines(map(_line, left))
    return kept, len(left)


def _line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
