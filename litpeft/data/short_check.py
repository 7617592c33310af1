"""The part of `litpeft data check` that runs before each training: counts that are known already, and a sample of rows.

See check.py for the rest, which takes longer than a user should wait for each time.
"""

import random

import numpy as np

from litpeft.core.errors import counted
from litpeft.core.terminal import clean
from litpeft.data.check import CHECKS
from litpeft.data.duplicates import nearly_the_same
from litpeft.data.rows import Row, said
from litpeft.data.store import Rows
from litpeft.data.tokenise import DataSet
from litpeft.data.tokenizer import Tokenizer

SAMPLE = 600  # rows to train on that are compared with each other
HELD_OUT = 100  # held-out rows that are compared with these
LETTERS = 2000  # of a row that are compared
FEW_TRAINED = 0.02  # share of trained tokens below which most of a run's time goes into prompts
NEARLY = 0.05  # share of near-duplicates in the sample that is worth a line


def concerns(data: DataSet, tokenizer: Tokenizer, seed: int, masked: bool) -> list[str]:
    """Returns what is worth a look before a run begins, a line each; what the data set's report says is not repeated.

    `seed` chooses the sample; `masked` says whether prompts are not trained.
    """
    report, train = data.report, data.report.train
    distinct = train.rows - report.repeated
    empty = sum(bad.reason.endswith("is empty") for bad in report.rejected)
    missing = train.rows - train.ended - (report.split_pieces - report.split_rows)
    double = 0 if tokenizer.bos_id is None else data.train.begin_with([tokenizer.bos_id] * 2)
    few = masked and train.trained < FEW_TRAINED * train.tokens
    found = {
        f"{counted(empty, 'row')} left out for an empty answer": empty,
        f"the rows left out for their length hold {counted(report.lost, 'trained token')}; data.max_length and "
        "data.overlong say what becomes of long rows": report.lost,
        "no row trains the token that ends an answer: the model will not learn to stop": not train.ended,
        f"in {counted(missing, 'row')} the token that ends an answer is not trained": train.ended and missing > 0,
        f"{counted(double, 'row')} begin with the token that begins a text, twice": double,
        f"only {train.trained / train.tokens:.2%} of the tokens are trained: most of the time goes into prompts": few,
        f"{counted(report.repeated, 'row')} of {train.rows:,} repeat another, token by token": (
            report.repeated > CHECKS["duplicate"].limit * distinct
        ),
        **_alike(data, seed),
    }
    return [clean(f"warning: {line}").replace("\n", " ") for line, present in found.items() if present]


def _alike(data: DataSet, seed: int) -> dict[str, bool]:
    """Returns lines on near-duplicates in a sample of the rows, with whether there are enough of them."""
    chance = random.Random(seed)
    train, held_out = (
        _sample(rows, rows.examples(), most, chance)
        for rows, most in ((data.train, SAMPLE), (data.validation, HELD_OUT))
    )
    rows = [*train, *held_out]
    near = nearly_the_same(len(rows), lambda at: _text(rows[at])).tolist()
    same = {tuple(row.ids) for row in train}
    both = list(zip(held_out, near[len(train) :], strict=True))
    leaked = sum(0 <= at < len(train) and tuple(row.ids) not in same for row, at in both)
    alike = sum(at >= 0 and train[at].ids != row.ids for row, at in zip(train, near, strict=False))
    return {
        f"{alike:,} of {counted(len(train), 'row')} looked at say nearly the same as another": (
            alike > NEARLY * len(train)
        ),
        f"{leaked:,} of {counted(len(held_out), 'held-out row')} looked at say nearly the same as a row to train on: "
        "the validation loss will flatter the run": leaked > NEARLY * len(held_out),
    }


def _sample(rows: Rows, numbers: np.ndarray, most: int, chance: random.Random) -> list[Row]:
    places = range(len(numbers)) if len(numbers) <= most else chance.sample(range(len(numbers)), most)
    return [rows[numbers[at]] for at in places]


def _text(row: Row) -> str:
    return said(row)[:LETTERS]
