"""What a run measures at its end: the loss of rows and of neutral text, without and with what was learned.

The delta is switched off for the first. Where base parameters train there is nothing to switch off: then the first are
measured before the first step, and a checkpoint keeps them.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from litpeft.data.rows import Row
from litpeft.data.store import Rows
from litpeft.generate.evaluate import Exchange, one_line
from litpeft.model.delta import trainable, without_delta
from litpeft.model.gpt import GPT
from litpeft.model.objective import MICRO_TOKENS, mean_loss, row_losses
from litpeft.train.budget import STEP
from litpeft.train.preparation import Preparation
from litpeft.train.progress import Progress
from litpeft.train.row_losses import RowLoss, RowLosses, told_apart, write_rows

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

ROWS_SHARE = 0.03  # of the training's time, for the losses of rows
NEUTRAL_SHARE = 0.02  # and for that of neutral text
PASSES = 2  # forward passes of what is measured at the end
FEWEST_ROWS, MOST_ROWS, FEWEST_TEXTS = 1, 1000, 1


@dataclass(frozen=True)
class Ended:
    """What was measured at the end of a run."""

    rows: RowLosses | None = None
    neutral: tuple[float, float] | None = None  # loss of neutral text before and after


def chosen(rows: Rows, seed: int, tokens: float, wanted: int | str) -> list[int]:
    """Returns the numbers of rows in a random order: `wanted`, or for auto what fits into so many tokens."""
    numbers = array("q", rows.distinct().tobytes())
    random.Random(f"{seed} rows").shuffle(numbers)
    most = MOST_ROWS if wanted == "auto" else wanted
    first = numbers[:most].tolist()
    if wanted != "auto":
        return first
    return first[: max(FEWEST_ROWS, fitting(rows.column("tokens")[first], tokens))]


def fitting(lengths: Sequence[int] | np.ndarray, tokens: float) -> int:
    """Returns how many of the first texts, of so many tokens each, have at most `tokens` together."""
    return int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens, side="right"))


def affordable(trained: int, share: float) -> float:
    """Returns the tokens that can be measured in a share of the time that training on `trained` tokens takes."""
    return share * trained * STEP / PASSES


@dataclass
class Ending:
    """Measures a run's rows and neutral text."""

    run: Preparation
    model: torch.nn.Module  # as Fabric wraps it
    gpt: GPT
    fabric: "Fabric"

    @property
    def trains_base(self) -> bool:
        return any(name in self.gpt.base_keys for name in trainable(self.gpt))

    def before(self, progress: Progress) -> None:
        """Measures the base before the first step, if it cannot be measured at the end."""
        if not self.trains_base:
            return
        rows = self.run.rows
        epoch = -(-len(rows.train) // self.run.settings.train.batch_size)  # steps of it
        numbers, texts = self.subjects(rows.report.train.tokens * self.run.steps // epoch)
        with without_delta(self.gpt):
            progress.before_rows = list(zip(numbers, self.losses(numbers), strict=True))
            progress.before_neutral = (len(texts), self.mean(texts)) if texts else None

    def after(self, progress: Progress) -> Ended:
        """Returns what is measured at the end; the ranks share the work, and the first writes rows.csv."""
        numbers, texts = self.subjects(progress.tokens)
        if progress.before_rows or progress.before_neutral:
            known = dict(progress.before_rows)
            numbers = [number for number in numbers if number in known]
            before = [known[number] for number in numbers]
            count, neutral = progress.before_neutral or (0, None)
            texts = self.run.neutral[:count]
        elif self.trains_base:  # the checkpoint of an early version has no figures from before
            before, texts, neutral = [None] * len(numbers), [], None
        else:
            with without_delta(self.gpt):
                before, neutral = self.losses(numbers), self.mean(texts) if texts else None
        after = self.losses(numbers)
        rows = [
            row_loss(self.run.rows.train[number], *pair) for number, *pair in zip(numbers, before, after, strict=True)
        ]
        if rows and self.fabric.is_global_zero:
            write_rows(Path(self.run.settings.out) / "rows.csv", rows)
        told = told_apart(rows, len(self.run.rows.train)) if rows else None
        return Ended(told, (neutral, self.mean(texts)) if texts else None)

    def subjects(self, trained: int) -> tuple[list[int], list[Row]]:
        """Returns the rows' numbers and the neutral text that a run of so many tokens can afford to measure."""
        settings = self.run.settings
        tokens = affordable(trained, ROWS_SHARE)
        pairs = settings.preference.loss is not None  # losses of single rows say little of them
        numbers = [] if pairs else chosen(self.run.rows.train, settings.data.seed, tokens, settings.ending.rows)
        count = fitting([len(text.ids) for text in self.run.neutral], affordable(trained, NEUTRAL_SHARE))
        return numbers, self.run.neutral[: max(FEWEST_TEXTS, count)]

    def losses(self, numbers: list[int]) -> list[float]:
        rows = [self.run.rows.train[number] for number in numbers]
        return row_losses(self.model, rows, self.fabric.device, self.fabric) if rows else []

    def mean(self, texts: list[Row]) -> float:
        return mean_loss(self.model, texts, MICRO_TOKENS, self.fabric.device, self.fabric)


def row_loss(row: Row, before: float | None, after: float) -> RowLoss:
    exchange = Exchange.of(row)
    told = one_line(exchange.asked), one_line(exchange.expected)
    return RowLoss(row.source, len(row.ids), sum(row.trained), before, after, *told)
