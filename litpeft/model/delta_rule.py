"""The gated delta rule: each head has a matrix that remembers a text. A token fades it, corrects it and reads it.

    S_t = g_t S_{t-1} + k_t (b_t (v_t - g_t S_{t-1}^T k_t))^T        y_t = S_t^T q_t        S_0 = 0

Gated DeltaNet https://arxiv.org/abs/2412.06464. The tokens of a document are computed in chunks. What a chunk writes
into S is its keys times the corrections u of its tokens, which solve a triangular system:

    u_i = b_i (v_i - G_i S^T k_i - sum over j < i of G_i / G_j (k_j . k_i) u_j)        G_i = g_1 ... g_i
    y_i = G_i S^T q_i + sum over j <= i of G_i / G_j (k_j . q_i) u_j

Letters: N tokens, M chunks, C tokens of a chunk, H heads, K size of a key, V size of a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64  # tokens


@dataclass
class Chunks:
    """Where the tokens of documents lie, in chunks: first the first chunk of each document, then the second ones, ...

    The longest document comes first, so that those with a chunk more are the first ones of a step.
    """

    token: Tensor  # (M, C) number of each token; 0 at places without one
    real: Tensor  # (M, C) whether there is one
    place: Tensor  # (N,) where each token lies among the M * C places
    order: Tensor  # (documents,) their numbers, the longest first
    counts: tuple[int, ...]  # chunks of each step

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], tokens: int, device: torch.device) -> "Chunks":
        """Returns the chunks of documents that begin at `starts`, among so many tokens."""
        longest = max(lengths)
        size, order = min(CHUNK, longest), sorted(range(len(lengths)), key=lambda i: -lengths[i])
        steps = [[(i, at) for i in order if at < lengths[i]] for at in range(0, longest, size)]
        first = torch.tensor([starts[i] + at for step in steps for i, at in step])[:, None]
        left = torch.tensor([lengths[i] - at for step in steps for i, at in step])[:, None]
        real = torch.arange(size) < left
        token = (first + torch.arange(size)).masked_fill(~real, 0)
        place = torch.zeros(tokens, dtype=torch.long)
        place[token[real]] = torch.arange(token.numel()).view_as(token)[real]
        moved = (x.to(device, non_blocking=True) for x in (token, real, place, torch.tensor(order)))
        return cls(*moved, tuple(map(len, steps)))


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, fade: Tensor, write: Tensor, chunks: Chunks, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y (N, H, V), and each document's S (documents, H, K, V) at its end.

    q and k are (N, H, K), v is (N, H, V); `fade` is log g and `write` b, both (N, H). `memory` holds each document's S
    at its start, if it goes on.
    """
    q, k, v, fade, write = (x[chunks.token].transpose(1, 2) for x in (q, k, v, fade, write))  # (M, H, C, ...)
    real = chunks.real[:, None]
    fade, write = fade.masked_fill(~real, 0), write.masked_fill(~real, 0)[..., None]  # other places change nothing
    size = fade.size(-1)
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    total = fade.cumsum(-1)  # log G
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
    G, written = total.exp()[..., None], k * write
    system = (written @ k.mT) * between  # of which only what lies below the diagonal counts
    right = torch.cat((v * write, written * G), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, known = solved.split((v.size(-1), k.size(-1)), -1)  # u = new - known S
    scores = (q @ k.mT) * between
    end = total[..., -1:]
    k = k * (end - total).exp()[..., None]
    parts = [x.split(chunks.counts) for x in (new, known, scores, q * G, k, end.exp()[..., None])]

    if memory is None:
        memory = q.new_zeros(len(chunks.order), *q.shape[1:2], k.size(-1), v.size(-1))
    else:
        memory = memory[chunks.order]
    ys, ended = [], []
    for new, known, scores, q, k, faded in zip(*parts, strict=True):
        ended.append(memory[len(q) :])  # of documents without a chunk more
        memory = memory[: len(q)]
        u = new - known @ memory
        ys.append(q @ memory + scores @ u)
        memory = memory * faded + k.mT @ u
    y = torch.cat(ys).transpose(1, 2).flatten(0, 1)[chunks.place]
    return y, torch.cat([memory, *reversed(ended)])[chunks.order.argsort()]
