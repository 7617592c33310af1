"""How often a run measures and shows samples by default: as often as fits into a share of its training.

Time is counted in tokens of forward passes and not read off a clock, so that every rank and every resumed run decides
the same. The start and the end are always measured, on one row at least.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from litpeft.core.errors import counted
from litpeft.data.rows import Row
from litpeft.train.settings import Finetune, Validation

MEASURED, SAMPLED = 0.1, 0.05  # shares of the training's time for held-out rows and for sample answers
PARTS = 10  # of a run, after each of which is measured where there is time
STEP = 2  # forward passes that a training step takes at least as long as
WORD = 16  # tokens of a forward pass that take as long as one new token of an answer
OPENING = 800  # the same for what precedes an answer's first token
AT_ONCE = 16  # answers that are written at once
ASKED = 2  # rows that are asked for a sample
FEWEST_TOKENS = 16  # of a sample answer; where they do not fit, none is shown
WARMUP = 4  # the warmup takes at most this part of the steps


@dataclass(frozen=True)
class Budget:
    """When a run measures, on how many held-out rows, and which of the measurements show a sample."""

    steps: int
    interval: int  # steps between two measurements
    rows: int  # held-out rows that are measured, from the first on
    sample_interval: int  # steps between two samples
    sample_tokens: int  # of a sample answer; 0: none is shown
    sample_first: bool = True  # one is shown at the start too

    @classmethod
    def of(
        cls, settings: Finetune, lengths: Sequence[int] | np.ndarray, held_out: Sequence[Row], steps: int
    ) -> "Budget":
        """Returns what fits; what the settings say themselves stays. `lengths`: tokens of the rows to train on."""
        validation, part = settings.validation, tenth(steps)
        rows = held_out[: validation.max_rows]
        epoch = -(-len(lengths) // settings.train.batch_size)  # steps of it
        room = STEP * int(np.sum(lengths)) * steps / epoch
        interval = validation.interval or part
        decides = validation.patience is not None or validation.final == "best"  # measurements change what is learned
        if rows and not decides:
            times = MEASURED * room / cost(rows, validation)
            interval = validation.interval or spread(times, steps, part)
            if times < 2 and interval >= steps and validation.max_rows is None:
                rows = rows[: fitting_rows(rows, validation, MEASURED * room / 2)]
        tokens, first = validation.sample_tokens, True
        room *= SAMPLED / (settings.devices * settings.num_nodes)  # each rank writes them
        asked = OPENING + sum(row.prompt_length for row in rows[:ASKED])
        if tokens == Validation.sample_tokens:
            first = room / 2 >= asked + WORD * FEWEST_TOKENS
            fits = int((room / (2 if first else 1) - asked) / WORD)
            tokens = min(tokens, fits) if fits >= FEWEST_TOKENS else 0
        shown = spread(room / (asked + WORD * tokens), steps, part) if tokens and first else steps
        return cls(steps, interval, len(rows), -(-shown // interval) * interval, tokens, first)

    def due(self, step: int) -> bool:
        """Returns whether the held-out rows are measured after this step."""
        return step % self.interval == 0 or step == self.steps

    def shows(self, step: int) -> bool:
        """Returns whether a sample is shown where this step is measured."""
        if not self.sample_tokens or (step == 0 and not self.sample_first):
            return False
        return step % self.sample_interval == 0 or step == self.steps

    def note(self, held_out: int, validation: Validation) -> str:
        """Returns a line on what is less than the settings or their defaults say; "" where nothing is."""
        if not self.rows:
            return ""
        lacks = []
        if self.rows < held_out or self.interval > (validation.interval or tenth(self.steps)):
            of = f"{self.rows:,} of {counted(held_out, 'held-out row')}"
            often = self.interval < self.steps
            when = f"every {self.interval:,} of {self.steps:,} steps" if often else "at start and end"
            lacks.append(f"measured {when}, on {of} (validation.interval, validation.max_rows)")
        if self.sample_tokens < validation.sample_tokens:
            only = "" if self.sample_first else " at the end"
            what = f"sample answers{only} of up to {self.sample_tokens} tokens" if self.sample_tokens else "no samples"
            lacks.append(f"{what} in so short a run (validation.sample_tokens)")
        return "; ".join(lacks)


def tenth(steps: int) -> int:
    """Returns the steps of a tenth of a run, rounded up: ten measurements are never more."""
    return -(-steps // PARTS)


def spread(times: float, steps: int, part: int) -> int:
    """Returns the steps between two of at most so many times, the start's and the end's among them."""
    return max(part, -(-steps // max(1, int(times) - 1)))


def fitting_rows(rows: Sequence[Row], validation: Validation, room: float) -> int:
    """Returns how many of the first rows can be measured for so much, one at least."""
    return max(1, bisect_right(range(1, len(rows) + 1), room, key=lambda count: cost(rows[:count], validation)))


def cost(rows: Sequence[Row], validation: Validation) -> float:
    """Returns what one measurement costs, in tokens of a forward pass."""
    read = sum(row.tokens for row in rows)
    if validation.metric != "exact":
        return read
    longest = max(sum(row.trained) for row in rows) + 8
    return 2 * read + OPENING + WORD * longest * -(-len(rows) // AT_ONCE)


def fitting_warmup(warmup_steps: int, steps: int) -> int:
    """Returns the steps of the warmup in a run of so many."""
    return min(warmup_steps, steps // WARMUP)
