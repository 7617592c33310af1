"""The gated delta rule: each head has a matrix that remembers a text. A token fades it, corrects it and reads it.

    S_t = g_t S_{t-1} + k_t (b_t (v_t - g_t S_{t-1}^T k_t))^T        y_t = S_t^T q_t        S_0 = 0

Gated DeltaNet https://arxiv.org/abs/2412.06464. The tokens of a document are computed in chunks. What a chunk writes
into S is its keys times the corrections u of its tokens, which solve a triangular system:

    u_i = b_i (v_i - G_i S^T k_i - sum over j < i of G_i / G_j (k_j . k_i) u_j)        G_i = g_1 ... g_i
    y_i = G_i S^T q_i + sum over j <= i of G_i / G_j (k_j . q_i) u_j

Letters: M chunks, C tokens of a chunk, H heads, K size of a key, V size of a value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
