"""The log of a run while it trains: a line or a bar in the terminal, metrics.csv, and optionally TensorBoard."""

import math
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from litpeft.core.errors import ConfigError, ModelError, counted
from litpeft.core.terminal import clean, tell

COLUMNS = (
    "step",  # optimizer steps made so far, this one included
    "epoch",  # passes over the data so far
    "loss",  # mean over the step's trained tokens, in nats
    "val_loss",  # the same over the held-out rows
    "val_exact",  # share of these that are answered exactly
    "lr",
    "grad_norm",  # of the gradient before clipping
    "tokens",  # read since the run began
    "trained_tokens",  # those that count in the loss
    "tokens_per_second",
    "seconds",  # since the run began; compared with max_time
    "val_preferred",  # share of the held-out pairs whose chosen answer is preferred
    "val_margin",  # by how much, their mean
)
LATER = ("val_preferred", "val_margin")  # columns that files of earlier versions lack
# what TensorBoard draws
SCALARS = ("loss", "val_loss", "val_exact", *LATER, "lr", "grad_norm", "tokens_per_second")
LINES = 20  # printed for a run if there is no terminal
WINDOW = 100  # steps whose mean duration predicts the remaining time


class PairFigures(NamedTuple):
    """A measurement on pairs of answers."""

    number: int
    preferred: float  # share of them with a margin above 0; one of exactly 0 counts half
    margin: float  # mean


class Log:
    """Takes the figures of the training loop; a context manager. Does nothing unless `enabled` (on rank 0).

    `steps` are the planned optimizer steps, `max_time` the planned seconds. A run that is resumed after `start_step`
    keeps the rows of metrics.csv up to that step; 0 starts a new file.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        tensorboard: bool = False,
        enabled: bool = True,
        start_step: int = 0,
        max_time: float | None = None,
    ):
        self.folder, self.steps, self.tensorboard, self.enabled = Path(folder), steps, tensorboard, enabled
        self.path, self.start_step, self.max_time = self.folder / "metrics.csv", start_step, max_time
        self.steps_done = 0  # by this process
        self.curve: list[tuple[float, float, float]] = []  # step, loss and lr of each step, whatever befalls the file
        self._pace: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._bar: Progress | None = None
        self._writer: Any = None
        self._printed = -1  # the last of the run's LINES parts that was printed
        self._unprinted = ""  # the newest line, if it was not printed

    def __enter__(self) -> "Log":
        if not self.enabled:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.tensorboard:
            purge = self.start_step + 1 if self.start_step else None  # hides what was logged after that step
            place = str(self.folder / "tensorboard")
            self._writer = summary_writer_class()(place, purge_step=purge, flush_secs=10)
        self._file, rows = open_metrics(self.path, self.start_step)
        self.curve = [(row["step"], row["loss"], row["lr"]) for row in rows if row["loss"] is not None]
        console = Console(stderr=True)
        if console.is_interactive and sys.stderr.isatty():  # is_interactive is true with FORCE_COLOR alone
            count = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
            columns = count, BarColumn(bar_width=None), TextColumn("{task.fields[figures]}")
            into_bar = sys.stdout.isatty()
            self._bar = Progress(*columns, console=console, expand=True, refresh_per_second=4, redirect_stdout=into_bar)
            self._task = self._bar.add_task("", total=self.steps, completed=self.start_step, figures="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        elif self._unprinted:
            self.message(self._unprinted)
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def step(self, **row: float) -> None:
        """Reports an optimizer step: its figures by COLUMNS, without those of a validation."""
        if not self.enabled:
            return
        self.steps_done += 1
        self._record(row)
        step, seconds = row["step"], row["seconds"]
        self.curve.append((step, row["loss"], row["lr"]))
        self._pace.append((step, seconds))
        left = time_left(self._pace, self.steps, self.max_time)
        figures = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s"
        figures += "" if left is None else f"  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        self._unprinted = f"step {step}/{self.steps}  {figures}"
        part = LINES * (step - self.start_step) // max(1, self.steps - self.start_step)
        if self.max_time:
            part = max(part, int(LINES * seconds / self.max_time))
        if part > self._printed or step >= self.steps:
            self.message(self._unprinted)
            self._printed, self._unprinted = part, ""

    def validation(
        self, step: int, loss: float, tokens: int, exact: float | None = None, pairs: PairFigures | None = None
    ) -> None:
        """Reports the validation loss after `step`, a mean over `tokens` trained tokens, or over `pairs` of answers.

        `exact` is the share of rows that are answered exactly, if it is measured.
        """
        if not self.enabled:
            return
        over, found, scores = f"{tokens:,} tokens", {"step": step, "val_loss": loss}, []
        if pairs is not None:
            over = counted(pairs.number, "pair")
            found |= {"val_preferred": pairs.preferred, "val_margin": pairs.margin}
            scores.append(f"{pairs.preferred:.1%} preferred, mean margin {pairs.margin:.4g}")
        if exact is not None:
            found["val_exact"] = exact
            scores.append(f"{exact:.1%} answered exactly")
        self._record(found)
        self.message(", ".join([f"step {step}/{self.steps}  validation loss {loss:.4f} over {over}", *scores]))

    def message(self, text: str) -> None:
        """Prints a line on standard error, above the bar if there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)
        else:
            tell(text)

    def _record(self, row: dict[str, float]) -> None:
        path = self.path
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))):
            self.message(f"{path} was removed: it is written again")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.seek(0)  # a removed file can be read while it is open
            path.write_text(self._file.read(), encoding="utf-8", newline="\n")
            self._file.close()
            self._file = append_to(path)
        self._file.write(",".join(_text(row.get(column)) for column in COLUMNS) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name in SCALARS:
                if name in row:
                    self._writer.add_scalar(name, row[name], row["step"])


def _text(value: float | None) -> str:
    """Returns the shortest text that parses to the same number."""
    return "" if value is None else repr(value if isinstance(value, int) else float(value))


def time_left(pace: Sequence[tuple[int, float]], steps: int, max_time: float | None) -> float | None:
    """Returns the seconds until step `steps` or `max_time`, None if unknown; `pace` has (step, seconds since start)."""
    (first, start), (last, now) = pace[0], pace[-1]
    ends = [] if last == first else [(steps - last) * (now - start) / (last - first)]
    if max_time:
        ends.append(max_time - now)
    return max(0.0, min(ends)) if ends else None


def duration(seconds: float) -> str:
    """Returns a duration as text: 8.3 s, 1 min 52 s, 2 h 5 min, 1 d 3 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    for unit, smaller, size, limit in (("min", "s", 60, 60), ("h", "min", 60, 24), ("d", "h", 24, float("inf"))):
        # round to the smaller unit first: 119.7 s are 2 min, not 1 min 60 s
        whole, rest = divmod(round(seconds), size)
        if whole < limit:
            break
        seconds /= size
    return f"{whole:,} {unit} {rest} {smaller}" if rest else f"{whole:,} {unit}"


def open_metrics(path: Path, start_step: int) -> tuple[TextIO, list[dict[str, float | None]]]:
    """Opens metrics.csv to append to; returns it with the rows that it keeps, those up to `start_step` (0: none)."""
    rows = _rows(path) if path.exists() else []  # even if none is kept: raises for another program's file
    rows = [(line, row) for line, row in rows if start_step and row["step"] <= start_step]
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in (",".join(COLUMNS), *(line for line, _ in rows)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return append_to(path), [row for _, row in rows]


def append_to(path: Path) -> TextIO:
    """Opens a file to read it and to append to it."""
    return open(path, "a+", encoding="utf-8", newline="\n")


def _rows(path: Path) -> list[tuple[str, dict[str, float | None]]]:
    """Returns each row as its line and its numbers. A last line without a line break is incomplete and left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if lines and lines[0] == ",".join(name for name in COLUMNS if name not in LATER):
        lines = [",".join(COLUMNS), *(line + "," * len(LATER) for line in lines[1:])]
    if lines and lines[0] != ",".join(COLUMNS):
        what = f'the first line is "{lines[0][:80]}", not the header of litpeft\'s metrics'
        raise ModelError(what, where=str(path), hint="move that file away, or choose another folder")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        try:
            row = {name: float(cell) if cell else None for name, cell in zip(COLUMNS, cells, strict=True)}
            row["step"] = float(cells[0])
            if row["loss"] is not None and not (row["lr"] is not None and math.isfinite(row["loss"] + row["lr"])):
                raise ValueError("both are of one step, and the curve needs them")
        except ValueError:
            what = f'"{line[:80]}" is not a row of {len(COLUMNS)} numbers'
            hint = "delete that line; every other row is still good"
            raise ModelError(what, where=f"{path}:{number}", hint=hint) from None
        rows.append((line, row))
    return rows


def summary_writer_class() -> Any:
    """Returns the class that writes TensorBoard files; raises if no package has one."""
    for module in ("tensorboardX", "torch.utils.tensorboard"):
        with suppress(ImportError):
            return import_module(module).SummaryWriter
    what = "TensorBoard files need a package that is not installed"
    raise ConfigError(what, where="tensorboard", hint="pip install tensorboardX")
