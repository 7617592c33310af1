"""Finds rows that say the same twice, word by word or nearly."""

import re
from collections.abc import Callable
from hashlib import blake2b
from zlib import crc32

import numpy as np

WORDS = 5  # that follow each other are compared as one
BANDS, DEPTH = 8, 4  # rows are compared if all numbers of one band are the same
PRIME = (1 << 61) - 1
WORD = re.compile(r"\w+")


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Returns for each key the index of the first one that is equal, or -1 if it is the first itself."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found = first[inverse.reshape(-1)]
    return np.where(found == np.arange(len(keys)), -1, found)


def nearly_the_same(count: int, text: Callable[[int], str], likeness: float = 0.8) -> np.ndarray:
    """Returns for each text the index of one before it that shares that part of all their runs of words, or -1.

    Candidates are found by MinHash (https://doi.org/10.1109/SEQUEN.1997.666900) and then compared. `text` returns a
    text by its index: what is kept of each is a number for each band.
    """
    numbers = np.random.default_rng(0)
    factors = numbers.integers(1, 1 << 29, (BANDS * DEPTH, 1), dtype=np.uint64)
    shifts = numbers.integers(0, 1 << 60, (BANDS * DEPTH, 1), dtype=np.uint64)
    bands = np.empty((BANDS, count), dtype=np.uint64)
    for at in range(count):
        runs = _runs(text(at))
        values = np.fromiter(runs, dtype=np.uint64, count=len(runs))
        smallest = ((factors * values + shifts) % PRIME).min(1, initial=PRIME).reshape(BANDS, DEPTH)
        bands[:, at] = [int.from_bytes(blake2b(one.tobytes(), digest_size=8).digest(), "little") for one in smallest]
    firsts = np.stack([first_of_each(band) for band in bands])
    found = np.full(count, -1)
    for at in np.flatnonzero((firsts >= 0).any(0)):
        runs = _runs(text(at))
        alike = (
            one for one in sorted({*firsts[:, at].tolist()} - {-1}) if _likeness(_runs(text(one)), runs) >= likeness
        )
        found[at] = next(alike, -1)
    return found


def _runs(text: str) -> frozenset[int]:
    """Returns a number for each run of words."""
    words = WORD.findall(text.lower())
    return frozenset(
        crc32(" ".join(words[i : i + WORDS]).encode(errors="replace")) for i in range(max(1, len(words) - WORDS + 1))
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
