"""The gated delta rule: each head has a matrix that remembers a text. A token fades it, corrects it and reads it.

    S_t = g_t S_{t-1} + k_t (b_t (v_t - g_t S_{t-1}^T k_t))^T        y_t = S_t^T q_t        S_0 = 0

Gated DeltaNet https://arxiv.org/abs/2412.06464. The tokens of a document are computed in chunks. What a chunk writes
into S is its keys times the corrections u of its tokens, which solve a triangular system:

    u_i = b_i (v_i - G_i S^T k_i - sum over j < i of G_i / G_j (k_j . k_i) u_j)        G_i = g_1 ... g_i
    y_i = G_i S^T q_i + sum over j <= i of G_i / G_j (k_j . q_i) u_j

Letters: M chunks, C tokens of a chunk, H heads, K size of a key, V size of a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a chunk, and chunks computed together. On a CPU smaller ones, which fit its cache, take half the time.
SIZES = {"cpu": (32, 4)}
OTHERS = (64, 128)


@dataclass
class Group:
    """The chunks of some steps: in step i are the i-th chunks of all documents that have one."""

    token: Tensor  # (M, C) the number of each place's token; 0 where there is none
    real: Tensor  # (M, C) whether there is one
    place: Tensor  # (tokens,) the places with one, of M * C; indices, since a GPU would have to count those of `real`
    window: Tensor  # (M, W - 1 + C) the tokens that the convolution of width W reads; 0 where there is none
    seen: Tensor  # (M, W - 1 + C) whether there is one
    counts: tuple[int, ...]  # chunks of each step

    def write(self, to: Tensor, places: Tensor) -> None:
        """Writes what lies in places (M, C, ...) to the rows (N, ...) of their tokens."""
        to.index_copy_(0, self.token.flatten()[self.place], places.flatten(0, 1)[self.place])


@dataclass
class Chunks:
    """The tokens of documents. The longest document comes first, so that those with a chunk more are a step's first."""

    groups: list[Group]
    order: Tensor  # (documents,) their numbers, the longest first

    @classmethod
    def of(
        cls, starts: Sequence[int], lengths: Sequence[int], width: int, device: torch.device, lead: int = 0
    ) -> "Chunks":
        """Returns the chunks of documents that begin at `starts`. `width` is that of the convolution.

        It reads from rows that have `lead` more tokens before each document: those of earlier calls.
        """
        longest, order = max(lengths), sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size, most = SIZES.get(device.type, OTHERS)
        size = min(size, longest)
        groups: list[list[list[tuple[int, int]]]] = [[]]
        for at in range(0, longest, size):
            step = [(i, at) for i in order if at < lengths[i]]
            if groups[-1] and sum(map(len, groups[-1])) + len(step) > most:
                groups.append([])
            groups[-1].append(step)
        made = [cls.group(steps, starts, lengths, size, width, lead, device) for steps in groups]
        return cls(made, torch.tensor(order).to(device, non_blocking=True))

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


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, fade: Tensor, write: Tensor, counts: Sequence[int], memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y (M, H, C, V) of the chunks of some steps, and each document's S (documents, H, K, V) after them.

    q and k are (M, H, C, K), v is (M, H, C, V); `fade` is log g and `write` b, both (M, H, C) and 0 at places without a
    token. `memory` holds S before the steps, of the documents of the first one; `counts` says how many are in each.
    """
    past = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
    total, write = fade.cumsum(-1), write[..., None]  # log G
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
    G, written = total.exp()[..., None], k * write
    system = (written @ k.mT) * between  # of which only what lies below the diagonal counts
    right = torch.cat((v * write, written * G), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, known = solved.split((v.size(-1), k.size(-1)), -1)  # u = new - known S
    scores, end = (q @ k.mT) * between, total[..., -1:]
    k = k * (end - total).exp()[..., None]
    of_steps = (x.split(counts) for x in (new, known, scores, q * G, k, end.exp()[..., None]))
    ys, ended = [], []
    for new_, known_, scores_, q_, k_, faded in zip(*of_steps, strict=True):
        ended.append(memory[len(q_) :])  # of documents without a chunk more
        memory = memory[: len(q_)]
        u = new_ - known_ @ memory
        ys.append(q_ @ memory + scores_ @ u)
        memory = memory * faded + k_.mT @ u
    return torch.cat(ys), torch.cat([memory, *reversed(ended)])
