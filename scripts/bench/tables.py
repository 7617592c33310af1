"""Figures of several rounds as a table in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Round = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One figure of a run."""

    title: str
    key: str
    scale: float = 1.0
    digits: int = 0


TRAINING = [
    Column("real tokens/s", "real_per_second"),
    Column("trained tokens/s", "trained_per_second"),
    Column("CPU s per 1,000 real tokens", "cpu_seconds_per_1000", digits=1),
    Column("peak memory, GB", "peak_bytes", 1e-9, 2),
    Column("first step after, s", "first_step_seconds", digits=1),
    Column("held-out loss", "loss", digits=4),
    Column("of the roof, %", "roof_share", 100),
    Column("computed", "computed"),
    Column("real", "real"),
    Column("trained", "trained"),
]
GENERATION = [
    Column("new tokens/s", "decode_per_second", digits=1),
    Column("prompt tokens/s", "prompt_per_second"),
    Column("peak memory, GB", "peak_bytes", 1e-9, 2),
    Column("load, s", "load_seconds", digits=1),
    Column("of the bandwidth, %", "roof_share", 100),
]
MERGING = [
    Column("seconds", "seconds", digits=1),
    Column("CPU seconds", "cpu_seconds", digits=1),
    Column("peak memory, GB", "peak_bytes", 1e-9, 2),
]


def cell(values: Sequence[float], column: Column) -> str:
    """Returns the median, and the least and the most where the rounds differ."""
    if not values:
        return ""
    shown = [f"{value * column.scale:,.{column.digits}f}" for value in (median(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}–{shown[2]})"


def table(results: dict[str, list[Round]], columns: Sequence[Column], settings: dict[str, str]) -> str:
    """Returns a table in Markdown with a line for each entry; a round that failed has a `failed` that says how."""
    lines = ["| | " + " | ".join(column.title for column in columns) + " | notes |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, rounds in results.items():
        good = [r for r in rounds if "failed" not in r]
        note = settings.get(name, "")
        bad = next((r["failed"] for r in rounds if "failed" in r), None)
        if bad is not None:
            note += f"; {len(rounds) - len(good)} of {len(rounds)} rounds failed: {bad}"
        cells = [cell([r[c.key] for r in good if r.get(c.key) is not None], c) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {note} |")
    return "\n".join(lines)
