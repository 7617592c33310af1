"""The tokens of documents in chunks, for layers that keep what they know of a text in matrices.

Letters: M chunks, C tokens of a chunk, W width of the convolution, F its channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a chunk, and chunks computed together. On a CPU smaller ones, which fit its cache, take half the time.
SIZES = {"cpu": (32, 4)}
OTHERS = (64, 128)
STEPS = 4  # steps of a group, at least, where documents have as many


@dataclass
class Group:
    """The chunks of some steps: in step i are the i-th chunks of all documents that have one."""

    token: Tensor  # (M, C) the number of each place's token; 0 where there is none
    real: Tensor  # (M, C) whether there is one
    place: Tensor  # (tokens,) the places with one, of M * C; indices, since a GPU would have to count those of `real`
    window: Tensor  # (M, W - 1 + C) the tokens that the convolution of width W reads; 0 where there is none
    seen: Tensor  # (M, W - 1 + C) whether there is one
    counts: tuple[int, ...]  # chunks of each step

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns a convolution (M, C, F) of x (M, W - 1 + C, F); no token sees one of another document."""
        tokens, weight = self.token.size(1), weight[:, 0].to(x.dtype)
        x = x.where(self.seen[..., None], 0)
        y = x[:, :tokens] * weight[:, 0]
        for at in range(1, weight.size(1)):
            y = torch.addcmul(y, x[:, at : at + tokens], weight[:, at])
        return y if bias is None else y + bias.to(x.dtype)

    def write(self, to: Tensor, places: Tensor) -> None:
        """Writes what lies in places (M, C, ...) to the rows (N, ...) of their tokens."""
        to.index_copy_(0, self.token.flatten()[self.place], places.flatten(0, 1)[self.place])


@dataclass
class Batch:
    """Documents that are computed together. The longest is first, so that those with a chunk more are a step's first.

    A backward pass needs what a group began with, of each of its documents. So those with many chunks are few.
    """

    groups: list[Group]
    documents: Tensor  # (documents,) their numbers, the longest first


@dataclass
class Chunks:
    """The tokens of documents."""

    batches: list[Batch]

    @classmethod
    def of(
        cls, starts: Sequence[int], lengths: Sequence[int], width: int, device: torch.device, lead: int = 0
    ) -> "Chunks":
        """Returns the chunks of documents that begin at `starts`. `width` is that of the convolution.

        It reads from rows that have `lead` more tokens before each document: those of earlier calls.
        """
        usual, most = SIZES.get(device.type, OTHERS)
        size = min(usual, max(lengths))
        most, batches, total = most * usual // size, [], 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            chunks = -(-lengths[i] // size)
            if not batches or (len(batches[-1]) >= max(1, most // STEPS) and total + chunks > most):
                batches.append([])
                total = 0
            batches[-1].append(i)
            total += chunks
        made = []
        for documents in batches:
            groups: list[list[list[tuple[int, int]]]] = [[]]
            for at in range(0, lengths[documents[0]], size):
                step = [(i, at) for i in documents if at < lengths[i]]
                if groups[-1] and sum(map(len, groups[-1])) + len(step) > most:
                    groups.append([])
                groups[-1].append(step)
            filled = [cls.group(steps, starts, lengths, size, width, lead, device) for steps in groups if steps]
            made.append(Batch(filled, torch.tensor(documents).to(device, non_blocking=True)))
        return cls(made)

    @staticmethod
    def group(
        steps: list[list[tuple[int, int]]],
        starts: Sequence[int],
        lengths: Sequence[int],
        size: int,
        width: int,
        lead: int,
        device: torch.device,
    ) -> Group:
        """Returns some steps, whose chunks are pairs of a document and the first token there."""
        pairs = [pair for step in steps for pair in step]
        first = torch.tensor([starts[i] + at for i, at in pairs])[:, None]
        left = torch.tensor([lengths[i] - at for i, at in pairs])[:, None]
        before = torch.tensor([at + lead for _, at in pairs])[:, None]
        moved = torch.tensor([(i + 1) * lead for i, _ in pairs])[:, None]
        inside, reads = torch.arange(size), torch.arange(1 - width, size)
        real, seen = inside < left, (reads < left) & (reads >= -before)
        token, window = (first + inside).where(real, 0), (first + moved + reads).where(seen, 0)
        ends = [chunk * size + min(size, lengths[i] - at) for chunk, (i, at) in enumerate(pairs)]
        place = torch.cat([torch.arange(chunk * size, end) for chunk, end in enumerate(ends)])
        tensors = (x.to(device, non_blocking=True) for x in (token, real, place, window, seen))
        return Group(*tensors, tuple(map(len, steps)))
