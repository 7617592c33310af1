"""Choosing the next token from a model's logits, as transformers does: penalty, temperature, top-k, top-p, min-p.

Letters: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.generate.settings import Sampling


def penalised(logits: Tensor, history: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Returns logits (B, V) with each row's earlier tokens made less likely, however often they came."""
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=logits.device)
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities (B, V) that the next token is drawn from, for a temperature above 0."""
    scores = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # the likeliest token's is 0
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.size(-1)), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, stable=True)  # the least likely first
        rest = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        rest[:, -1] = False
        scores = scores.masked_fill(rest.scatter(1, order, rest), -torch.inf)
    if sampling.min_p:
        scores = scores.masked_fill(scores.exp() < sampling.min_p, -torch.inf)
    return scores.softmax(-1)


def next_tokens(
    logits: Tensor, history: Sequence[Sequence[int]], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """Returns the next token (B,) of each row from logits (B, V); `history` holds each row's tokens, prompt included.

    Every row draws from its own generator, so that its answer does not depend on the rows beside it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not torch.isfinite(logits.amax(-1)).all():
        hint = "the files may be damaged; 16-true overflows in some models, 32-true does not"
        raise ModelError("the model's output is not finite", hint=hint)
    if sampling.repetition_penalty != 1:
        logits = penalised(logits, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = distribution(logits, sampling)
    draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(draws)
