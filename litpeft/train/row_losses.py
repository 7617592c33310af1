"""The losses of rows without and with what was learned: rows.csv, and which rows stand out."""

import csv
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

KNOWN = 0.1  # nats per token; a row with less needed no training
PEERS = 20  # rows from which on it can be said that one is unlike the others
SHOWN = 3  # rows of each kind in the report


@dataclass(frozen=True)
class RowLoss:
    """A row to train on, with its loss without and with what was learned."""

    source: str  # file:line
    tokens: int
    trained: int
    before: float | None  # nats per trained token
    after: float
    asked: str  # shortened
    expected: str


@dataclass(frozen=True)
class RowLosses:
    """The losses of rows, and which of them stand out."""

    of: int  # rows to train on, of which these were chosen
    measured: int
    hardest: list[RowLoss]  # with the highest loss at the end
    known: list[RowLoss]  # that had a low loss before
    known_count: int
    suspects: list[RowLoss]  # whose loss stays far above the others': their answers may be wrong
    suspect_count: int


def told_apart(rows: list[RowLoss], of: int) -> RowLosses:
    """Returns which rows stand out."""
    falling = sorted(rows, key=lambda row: -row.after)
    known = sorted((row for row in rows if row.before is not None and row.before < KNOWN), key=lambda row: row.before)
    doubtful = [row for row in falling if row.after > far_above([row.after for row in rows])]
    return RowLosses(of, len(rows), falling[:SHOWN], known[:SHOWN], len(known), doubtful[:SHOWN], len(doubtful))


def far_above(losses: list[float]) -> float:
    """Returns the loss above which a row is unlike the others: three times the middle half's width above that half.

    So Tukey draws the fence for values that are far out. Among few rows, or where all losses are small, nothing is.
    """
    if len(losses) < PEERS:
        return float("inf")
    low, middle, high = statistics.quantiles(losses, n=4)
    return max(high + 3 * (high - low), 2 * middle, 0.5)


def write_rows(path: Path, rows: list[RowLoss]) -> None:
    """Writes the rows' losses, the highest at the end first."""
    doubtful = far_above([row.after for row in rows])
    part = path.with_name(path.name + ".part")  # begun anew after a kill, like the report's
    with open(part, "w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(["file", "line", "tokens", "trained_tokens", "loss_before", "loss_after", "note"])
        for row in sorted(rows, key=lambda row: -row.after):
            file, _, line = row.source.rpartition(":")
            before = "" if row.before is None else f"{row.before:.6g}"
            known = row.before is not None and row.before < KNOWN
            note = "far above the others" if row.after > doubtful else "known before" if known else ""
            table.writerow([file, line, row.tokens, row.trained, before, f"{row.after:.6g}", note])
    os.replace(part, path)
