"""Prompt tuning: learned vectors stand before the text, in place of the embeddings of tokens.

    x = [P; embed(ids)]        P (n, d), at the positions 0 to n - 1 of each document; the text begins at n

Prompt tuning https://arxiv.org/abs/2104.08691.
Trains prompt_length * d parameters. Does not fold: the vectors are part of what the model reads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.kinds import check_choices, check_least
from litpeft.data.tokenizer import Tokenizer
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta

COMMON = 5000  # tokens, the first of a vocabulary: the most frequent ones, as byte pairs are merged in that order


class VirtualTokens(Delta):
    """Learned vectors (n, width) at the first n positions of each document; elsewhere y stays as it is."""

    claims = "the virtual tokens"

    def __init__(self, count: int, width: int, spread: float):
        super().__init__()
        self.virtual_tokens = count
        self.tensor("vectors", (count, width), lambda vectors: nn.init.uniform_(vectors, -spread, spread))

    def forward(self, y: Tensor, *context: object) -> Tensor:
        ctx, n = context[-1], self.virtual_tokens
        if ctx is None:  # in the head
            return y
        table = F.pad(self.vectors.to(y.dtype), (0, 0, 0, 1))  # row n is for the text, and gets no gradient
        vectors = F.embedding(ctx.pos.clamp(max=n), table, padding_idx=n)  # (B, T, width)
        return torch.where((ctx.pos < n)[..., None], vectors, y)


@dataclass
class Prompt(Method):
    """Learned vectors before the text, in place of tokens."""

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
        model.after_embed.add("prompt", VirtualTokens(self.prompt_length, model.config.d_model, spread=0.5))

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        if self.init == "random":
            return
        chosen = torch.tensor(self.tokens) if self.tokens else torch.randperm(min(COMMON, len(weight)))
        chosen = chosen.repeat(-(-self.prompt_length // len(chosen)))[: self.prompt_length]
        copy_shard(model.after_embed.deltas["prompt"].vectors, weight[chosen.to(weight.device)])
