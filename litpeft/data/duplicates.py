"""Finds rows that say the same twice, word by word or nearly."""

import re
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np

WORDS = 5  # that follow each other are compared as one
BANDS, DEPTH = 8, 4  # rows are compared if all numbers of one band are the same
PRIME = (1 << 61) - 1
WORD = re.compile(r"\w+")


def first_of_each(keys: Iterable[object]) -> list[int | None]:
    """Returns for each key the index of an equal one before it, or None."""
    seen: dict[object, int] = {}
    found = []
    for at, key in enumerate(keys):
        first = seen.setdefault(key, at)
        found.append(None if first == at else first)
    return found


def nearly_the_same(texts: Sequence[str], likeness: float = 0.8) -> list[int | None]:
    """Returns for each text the index of one before it that shares that part of all their runs of words, or None.

    Candidates are found by MinHash (https://doi.org/10.1109/SEQUEN.1997.666900) and then compared.
    """
    numbers = np.random.default_rng(0)
    factors = numbers.integers(1, 1 << 29, (BANDS * DEPTH, 1), dtype=np.uint64)
    shifts = numbers.integers(0, 1 << 60, (BANDS * DEPTH, 1), dtype=np.uint64)
    buckets: list[dict[bytes, int]] = [{} for _ in range(BANDS)]
    runs: list[frozenset[int]] = []
    found: list[int | None] = []
    for at, text in enumerate(texts):
        runs.append(_runs(text))
        values = np.fromiter(runs[-1], dtype=np.uint64, count=len(runs[-1]))
        smallest = ((factors * values + shifts) % PRIME).min(1, initial=PRIME)
        bands = [smallest[DEPTH * i : DEPTH * (i + 1)].tobytes() for i in range(BANDS)]
        candidates = {buckets[i].setdefault(band, at) for i, band in enumerate(bands)} - {at}
        found.append(min((one for one in candidates if _likeness(runs[one], runs[at]) >= likeness), default=None))
    return found


def _runs(text: str) -> frozenset[int]:
    """Returns a number for each run of words."""
    words = WORD.findall(text.lower())
    return frozenset(
        crc32(" ".join(words[i : i + WORDS]).encode(errors="replace")) for i in range(max(1, len(words) - WORDS + 1))
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
