"""Rows as micro-batches, concatenated and never padded; and which rows make which optimizer step."""

import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from litpeft.data.rows import Row

GROUP = 50  # steps whose rows are sorted by length together
T = TypeVar("T")
PLACEHOLDER = 0  # token that stands where a method puts learned vectors: which one it is changes nothing


@dataclass(frozen=True)
class Pairs:
    """P pairs of answers: the documents of a micro-batch, the better one of each pair first."""

    counts: Tensor  # (P, 2) int64, trained tokens of the two answers
    weights: Tensor  # (P,) float64, of the pairs in the loss
    references: Tensor | None  # (P, 2) float64, log p of the two answers at the run's start, if they are known

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Pairs":
        """Returns what a micro-batch of these rows has."""
        counts = [[sum(one.trained) for one in row.documents] for row in rows]
        known = [row.references for row in rows if row.references is not None]
        references = torch.tensor(known, dtype=torch.float64).view(-1, 2) if len(known) == len(rows) else None
        weights = torch.tensor([pair_weight(row) for row in rows], dtype=torch.float64)
        return cls(torch.tensor(counts, dtype=torch.int64).view(-1, 2), weights, references)

    def to(self, device: torch.device | str) -> "Pairs":
        """Returns the pairs with their tensors on the device."""
        references = None if self.references is None else self.references.to(device)
        return Pairs(self.counts.to(device), self.weights.to(device), references)

    def sums(self, losses: Tensor) -> Tensor:
        """Returns log p (P, 2) of the answers in float64 for the losses (N,) of all trained tokens, in their order."""
        lengths = self.counts.flatten()
        return -torch.segment_reduce(losses.double(), "sum", lengths=lengths, unsafe=True).view(-1, 2)


def pair_weight(row: Row) -> float:
    """Returns the weight of a pair in the loss, which all trained tokens of its row have."""
    return 1.0 if row.weights is None else max(row.weights)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: N documents in one row of T tokens, of which M have a next token that is trained."""

    ids: Tensor  # (1, T) int64
    lengths: tuple[int, ...]  # tokens of each document
    at: Tensor  # (M,) int64, positions in T whose next token is trained
    targets: Tensor  # (M,) int64, those next tokens
    prompt_lengths: tuple[int, ...]  # tokens of each document before its first trained one
    sources: tuple[str, ...]  # file:line of each document
    weights: Tensor | None = None  # (M,) float64, of these targets in the loss; None: all have weight 1
    pairs: Pairs | None = None  # where the documents are pairs of answers

    @property
    def tokens(self) -> int:
        return self.ids.size(1)

    @property
    def weight(self) -> float:
        """Returns the sum of the weights: what the summed loss is divided by."""
        return len(self.at) if self.weights is None else float(self.weights.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with its tensors on the device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "at", "targets")}
        moved |= {name: part.to(device) for name in ("weights", "pairs") if (part := getattr(self, name)) is not None}
        return replace(self, **moved)


def framed(tokens: Sequence[T], prompt: int, before: int, after: int, filler: T = PLACEHOLDER) -> list[T]:
    """Returns a document's tokens with so many placeholders before it and after its prompt."""
    return [*[filler] * before, *tokens[:prompt], *[filler] * after, *tokens[prompt:]]


def idle(row: Row, before: int = 0, after: int = 0) -> Batch:
    """Returns a micro-batch that trains nothing: a rank without rows of its own must still step with the others."""
    batch = collate([row], before, after)
    return replace(batch, at=batch.at[:0], targets=batch.targets[:0], weights=None)


def collate(rows: Sequence[Row], before: int = 0, after: int = 0) -> Batch:
    """Returns the rows as one micro-batch, each with placeholders before it and after its prompt, as a part of it."""
    ids = torch.tensor([i for row in rows for i in framed(row.ids, row.prompt_length, before, after)])
    # a document's first token is never trained, so the token before a trained one belongs to the same document
    marks = [t for row in rows for t in framed(row.trained, row.prompt_length, before, after, False)]
    trained = torch.tensor(marks).nonzero().flatten()
    lengths = tuple(before + len(row.ids) + after for row in rows)
    prompts = tuple(before + row.prompt_length + after for row in rows)
    sources, weights = tuple(row.source for row in rows), None
    if any(row.weights is not None for row in rows):
        own = [row.trained if row.weights is None else row.weights for row in rows]
        pairs = zip(own, rows, strict=True)
        every = [w for one, row in pairs for w in framed(one, row.prompt_length, before, after, 0.0)]
        weights = torch.tensor(every, dtype=torch.float64)[trained]
    return Batch(ids[None], lengths, trained - 1, ids[trained], prompts, sources, weights)


def collate_pairs(rows: Sequence[Row], before: int = 0, after: int = 0) -> Batch:
    """Returns pairs as one micro-batch of twice as many documents."""
    batch = collate([one for row in rows for one in row.documents], before, after)
    return replace(batch, weights=None, pairs=Pairs.of(rows))


def idle_pairs(row: Row, before: int = 0, after: int = 0) -> Batch:
    """Returns a micro-batch of no pairs that trains nothing."""
    return replace(idle(row, before, after), pairs=Pairs.of([]))


def bin_pack(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Returns row numbers in bins of up to `micro_tokens` tokens (first fit, longest first); a longer row is alone."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins: list[list[int]] = [[number] for number in order if lengths[number] > micro_tokens]
    fitting = order[len(bins) :]
    leaves = 1 << len(fitting).bit_length()
    room = [micro_tokens] * (2 * leaves)  # a tree: each node has the most room of its two children; leaf i is a bin
    found: dict[int, list[int]] = {}
    for number in fitting:
        node = 1
        while node < leaves:  # to the first bin with room
            node = 2 * node if room[2 * node] >= lengths[number] else 2 * node + 1
        found.setdefault(node, []).append(number)
        room[node] -= lengths[number]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins + [found[node] for node in sorted(found)]


class Plan(Sequence[list[int]]):
    """The optimizer steps of an epoch, each a list of row numbers; the last may be shorter. It holds one array."""

    def __init__(self, order: np.ndarray, batch_size: int):
        self._order, self._batch_size = order, batch_size

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, at: int) -> list[int]:
        start = range(len(self))[at] * self._batch_size
        return self._order[start : start + self._batch_size].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))

    __hash__ = None


def plan_epoch(rows: int, batch_size: int, epoch: int, seed: int, lengths: Sequence[int] | None = None) -> Plan:
    """Returns an epoch as optimizer steps.

    With `lengths`, in tokens, the rows of a step are about as long as each other: they are sorted within GROUP steps.
    It depends on the arguments alone, so that a resumed run needs only its step.
    """
    order, chance = array("i", range(rows)), random.Random(f"{seed} {epoch}")
    chance.shuffle(order)  # of an array of the standard library: numpy's is slower one number at a time
    order = np.frombuffer(order, np.int32)
    if lengths is None:
        return Plan(order, batch_size)
    shorter = -np.asarray(lengths)
    groups = (order[start : start + GROUP * batch_size] for start in range(0, rows, GROUP * batch_size))
    order = np.concatenate([group[np.argsort(shorter[group], kind="stable")] for group in groups])
    whole = rows // batch_size
    steps = array("i", range(whole))
    chance.shuffle(steps)
    full = order[: whole * batch_size].reshape(whole, batch_size)[np.frombuffer(steps, np.int32)]
    return Plan(np.concatenate([full.reshape(-1), order[whole * batch_size :]]), batch_size)


def padding(steps: Iterable[Sequence[int]], lengths: Sequence[int], size: int) -> float:
    """Returns the share of padding in passes of `size` rows of a step, if each row were as long as the longest."""
    tokens = places = 0
    for step in steps:
        found = [int(lengths[number]) for number in step]
        tokens += sum(found)
        places += sum(len(one) * max(one) for one in (found[at : at + size] for at in range(0, len(found), size)))
    return 1 - tokens / places


def lay_out(
    step: Sequence[int],
    lengths: Sequence[int] | Mapping[int, int],
    ranks: int,
    micro_tokens: int,
    micro_batch_size: int | None,
) -> list[list[list[int]]]:
    """Returns for each rank the micro-batches of a step of row numbers; `lengths` are those of its rows, in tokens.

    A micro-batch holds at most `micro_tokens` tokens, or `micro_batch_size` rows where that is given. Every rank gets
    as many as the others, since they wait for each other; an empty one stands for a dummy step.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    if ranks == 1:
        shares = [list(step)]
    else:  # the longest rows first, each to the rank with the fewest tokens
        for number in sorted(step, key=lambda i: -lengths[i]):
            rank = load.index(min(load))
            shares[rank].append(number)
            load[rank] += lengths[number]
    if micro_batch_size is None:
        packed = [bin_pack([lengths[i] for i in share], micro_tokens) for share in shares]
        layout = [[[share[i] for i in numbers] for numbers in bins] for share, bins in zip(shares, packed, strict=True)]
    else:
        starts = [range(0, len(share), micro_batch_size) for share in shares]
        layout = [[s[i : i + micro_batch_size] for i in at] for s, at in zip(shares, starts, strict=True)]
    most = max(map(len, layout))
    return [micro + [[] for _ in range(most - len(micro))] for micro in layout]
