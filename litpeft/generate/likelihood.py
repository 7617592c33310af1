"""The log-likelihoods of tokens after others, of many texts in one pass: log p(y | x) = sum_t log p(y_t | x, y_<t).

Letters: N scored tokens of a pass, T tokens of it, d model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from litpeft.core.errors import DataError, ModelError, counted
from litpeft.data.batches import framed, lay_out
from litpeft.model.context import Context
from litpeft.model.gpt import GPT
from litpeft.model.loss import chunk
from litpeft.model.objective import MICRO_TOKENS

Pair = tuple[Sequence[int], Sequence[int]]  # tokens that are given, and those after them that are scored


@dataclass(frozen=True)
class Likelihood:
    """How likely tokens are after others."""

    log_p: float  # of all of them, in nats
    greedy: bool  # whether each is the model's likeliest there


@torch.inference_mode()
def likelihoods(
    model: GPT, pairs: Sequence[Pair], came: Callable[[int], None] = lambda pairs: None
) -> list[Likelihood]:
    """Returns the likelihood of each pair's second part after its first, neither of which is empty.

    What is too long for the model loses its first tokens. Pairs that differ in their last token alone, such as the
    letters of a question's choices, are read once. `came` is told of how many more are done.
    """
    numbers: dict[tuple[tuple[int, ...], int], list[int]] = {}  # of the pairs with the same tokens before the last one
    for i, (given, scored) in enumerate(pairs):
        if not given or not scored:
            raise ValueError("both parts of a pair must have tokens")
        if len(scored) > model.reach:
            what = f"an answer to score has {counted(len(scored), 'token')}; the model reads {model.reach:,}"
            raise DataError(what, hint="choose a task with shorter ones, or a model that reads more")
        ids = [*given, *scored][-(model.reach + 1) : -1]  # the last token is a target only
        numbers.setdefault((tuple(ids), len(ids) + 1 - len(scored)), []).append(i)
    texts, frame = list(numbers), model.frame
    found: list[Likelihood | None] = [None] * len(pairs)
    lengths = [sum(frame) + len(ids) for ids, _ in texts]
    for passed in lay_out(range(len(texts)), lengths, 1, MICRO_TOKENS, None)[0]:
        documents = [texts[at] for at in passed]
        asked = [numbers[document] for document in documents]
        targets = [[pairs[i][1] for i in same] for same in asked]
        for same, likely in zip(asked, one_pass(model, documents, targets), strict=True):
            for i, one in zip(same, likely, strict=True):
                found[i] = one
        came(sum(map(len, asked)))
    return found


def one_pass(
    model: GPT, documents: Sequence[tuple[Sequence[int], int]], targets: Sequence[Sequence[Sequence[int]]]
) -> list[list[Likelihood]]:
    """Returns the likelihoods of each document's targets, from one pass over all documents.

    A document is the tokens that are read, and how many of them are given; each of its targets is the tokens that
    follow these, of which all but the last are in it.
    """
    before, after = model.frame
    device = model.embed.weight.device
    ids = torch.tensor([i for tokens, prompt in documents for i in framed(tokens, prompt, before, after)])
    lengths = tuple(before + len(tokens) + after for tokens, _ in documents)
    prompts = tuple(before + prompt + after for _, prompt in documents)
    counts = [len(of_one[0]) for of_one in targets]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    at = torch.tensor([place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)])
    x = model(ids[None].to(device), Context.packed(lengths, device, prompts), at=at.to(device), headless=True)
    starts = [0, *accumulate(counts)]
    scored = [
        (start + i, token)
        for start, of_one in zip(starts, targets, strict=False)
        for one in of_one
        for i, token in enumerate(one)
    ]
    rows, tokens = torch.tensor(scored, device=device).T
    log_p, greedy = token_scores(model, x, rows, tokens)
    sizes = [count for count, of_one in zip(counts, targets, strict=True) for _ in of_one]
    parts = zip(log_p.split(sizes), greedy.split(sizes), strict=True)
    return [[Likelihood(float(p.sum()), bool(g.all())) for p, g in islice(parts, len(of_one))] for of_one in targets]


def token_scores(model: GPT, x: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p of M tokens in float64, and whether each is the likeliest; both (M,), on the CPU.

    x (N, d) are the states that the head makes logits of; `rows` (M,) says which of them each token comes after.
    """
    log_p = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    greedy = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    size = chunk(x.device)
    for start in range(0, len(x), size):
        logits = model.logits(x[start : start + size])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        here = ((rows >= start) & (rows < start + size)).nonzero().flatten()
        row, token = rows[here] - start, tokens[here]
        log_p[here] = logits.log_softmax(-1)[row, token].double()
        greedy[here] = logits.argmax(-1)[row] == token
    log_p = log_p.cpu()
    if not torch.isfinite(log_p).all():
        hint = "the files may be damaged; 16-true overflows in some models, 32-true does not"
        raise ModelError("the model's output is not finite", hint=hint)
    return log_p, greedy.cpu()


def windows(tokens: Sequence[int], first: int, reach: int) -> Iterator[Pair]:
    """Yields a text in pieces of `reach` tokens at most, each of whose tokens is scored in one piece.

    The `first` token stands before the text and is given. The last piece reads as many earlier tokens as it has room
    for, the others one, as in https://huggingface.co/docs/transformers/perplexity with a stride of `reach`.
    """
    whole = [first, *tokens]
    for start in range(0, len(tokens), reach):
        end = min(start + reach, len(tokens))
        begin = max(0, end - reach) if end == len(tokens) else start
        yield whole[begin : start + 1], whole[start + 1 : end + 1]
