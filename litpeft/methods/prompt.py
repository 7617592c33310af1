"""Prompt tuning: learned vectors stand before the text, in place of the embeddings of tokens.

    x = [P; embed(ids)]        P (n, d), at the positions 0 to n - 1 of each document; the text begins at n

Prompt tuning https://arxiv.org/abs/2104.08691.
Trains prompt_length * d parameters. Does not fold: the vectors are part of what the model reads.
In peft: PROMPT_TUNING.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.exports import CannotExport
from litpeft.core.kinds import check_choices, check_least
from litpeft.data.tokenizer import Tokenizer
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta

Start = Callable[[Tensor], object]
COMMON = 5000  # tokens, the first of a vocabulary: the most frequent ones, as byte pairs are merged in that order


class Placed(Delta):
    """Vectors (n + m, width): n at each document's first positions, m after its prompt; elsewhere y stays as it is."""

    claims = "the virtual tokens"
    none_after = ""  # the setting with which no vectors stand after the prompt

    def __init__(self, before: int, after: int = 0, dropout: float = 0.0):
        super().__init__()
        self.virtual_tokens, self.infix_tokens, self.at_prompt = before, after, after > 0
        self.dropout = dropout

    def table(self) -> Tensor:
        """Returns the vectors (n + m, width), differentiably."""
        raise NotImplementedError(f"{type(self).__name__} must say what its vectors are")

    def peft(self) -> dict[str, Tensor]:
        if self.infix_tokens:
            what = f"{self.infix_tokens} of its vectors stand between prompt and answer, and peft has none there"
            raise CannotExport(f"{what}: a run with {self.none_after} becomes prompt tuning of peft")
        return {"prompt_embeddings": self.table()}

    def forward(self, y: Tensor, *context: object) -> Tensor:
        ctx, n, m = context[-1], self.virtual_tokens, self.infix_tokens
        if ctx is None:  # in the head
            return y
        row = torch.where(ctx.pos < n, ctx.pos, n + m)  # (B, T); row n + m is for the text, and gets no gradient
        if m and ctx.prompt_lengths is not None:
            after = ctx.pos - ctx.prompt_lengths + m
            row = torch.where((after >= 0) & (after < m), n + after, row)
        table = F.pad(self.table().to(y.dtype), (0, 0, 0, 1))
        vectors = F.dropout(F.embedding(row, table, padding_idx=n + m), self.dropout, self.training)  # (B, T, width)
        return torch.where((row < n + m)[..., None], vectors, y)


class VirtualTokens(Placed):
    """The vectors themselves are learned."""

    none_after = "method.infix_length 0"

    def __init__(self, width: int, start: Start, before: int, after: int = 0, dropout: float = 0.0):
        super().__init__(before, after, dropout)
        self.tensor("vectors", (before + after, width), start)

    def table(self) -> Tensor:
        return self.vectors


def uniform(spread: float) -> Start:
    """Returns a start of numbers drawn between -spread and spread."""
    return lambda tensor: nn.init.uniform_(tensor, -spread, spread)


@dataclass
class Prompt(Method):
    """Learned vectors before the text, in place of tokens."""

    training_only: ClassVar[tuple[str, ...]] = ("init", "text")

    prompt_length: int = 20
    """Vectors; the text that the model can read is shorter by as many tokens."""
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """What they start as: embeddings of common tokens, random numbers, or the embeddings of `text`."""
    text: str | None = None
    """With init text: what to start from, such as the task in words; repeated or cut to prompt_length tokens."""

    def __post_init__(self) -> None:
        check_choices(self, "method.")
        check_least(self, "method.", prompt_length=1, most=LONGEST_PROMPT)
        if (self.init == "text") != bool(self.text):
            raise ValueError("method.text must be given with method.init text, and with no other")
        self.tokens: list[int] = []  # of `text`

    def read(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.encode(self.text or "")

    def attach(self, model: GPT) -> None:
        model.after_embed.add("prompt", VirtualTokens(model.config.d_model, uniform(0.5), self.prompt_length))

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        if self.init != "random":
            copy_tokens(model.after_embed.deltas["prompt"].vectors, weight, self.tokens)


def copy_tokens(vectors: Tensor, weight: Tensor, tokens: list[int]) -> None:
    """Sets vectors (n, d) to rows of weight (V, d): those of tokens, repeated or cut, or without any of common ones."""
    chosen = torch.tensor(tokens) if tokens else torch.randperm(min(COMMON, len(weight)))
    chosen = chosen.repeat(-(-len(vectors) // len(chosen)))[: len(vectors)]
    copy_shard(vectors, weight[chosen.to(weight.device)])
