"""Rows of tokens as tensors: one after the other, never padded; and which rows make which optimizer step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litpeft.data.tokenise import Row


@dataclass(frozen=True)
class Batch:
    """A micro-batch: N documents in one row of T tokens, of which M have a next token that is trained."""

    ids: Tensor  # (1, T) int64
    lengths: tuple[int, ...]  # tokens of each document
    at: Tensor  # (M,) int64, positions in the row of T whose next token is trained
    targets: Tensor  # (M,) int64, those next tokens
    prompt_lengths: tuple[int, ...]  # tokens of each document before its first trained one
    sources: tuple[str, ...]  # file:line of each document

    @property
    def tokens(self) -> int:
        return self.ids.size(1)

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with its tensors on the device."""
        return replace(self, ids=self.ids.to(device), at=self.at.to(device), targets=self.targets.to(device))


def collate(rows: Sequence[Row]) -> Batch:
    """Returns the rows as one micro-batch."""
    ids = torch.tensor([i for row in rows for i in row.ids])
    # the first token of a document is never trained, so the token before a trained one is of the same document
    trained = torch.tensor([t for row in rows for t in row.trained]).nonzero().flatten()
    return Batch(
        ids[None],
        tuple(len(row.ids) for row in rows),
        trained - 1,
        ids[trained],
        tuple(row.prompt_length for row in rows),
        tuple(row.source for row in rows),
    )


def pack(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Returns numbers of rows in bins of at most `micro_tokens` tokens, the longest first; a longer row is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        place = next((i for i, free in enumerate(room) if length <= free), None)
        if place is None:
            bins.append([number])
            room.append(micro_tokens - length)
        else:
            bins[place].append(number)
            room[place] -= length
    return bins


def plan_steps(
    rows: Sequence[Row],
    batch_size: int,
    micro_tokens: int,
    micro_batch_size: int,
    packing: bool,
    epoch: int,
    seed: int,
) -> list[list[list[int]]]:
    """Returns an epoch as optimizer steps, each a list of micro-batches, each a list of row numbers.

    The rows are shuffled and cut into steps of `batch_size`; the last step takes what is left. The plan depends on
    nothing but the arguments, so a resumed run needs to know only its epoch and step.
    """
    order = list(range(len(rows)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    steps = []
    for start in range(0, len(order), batch_size):
        step = order[start : start + batch_size]
        if packing:
            bins = pack([len(rows[i].ids) for i in step], micro_tokens)
            steps.append([[step[i] for i in numbers] for numbers in bins])
        else:
            steps.append([step[i : i + micro_batch_size] for i in range(0, len(step), micro_batch_size)])
    return steps
