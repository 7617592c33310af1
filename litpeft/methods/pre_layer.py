"""PreLayer: what the model computes at special tokens, before the text and after its prompt, is learned in every layer.

    h_l = [P_l; h_l of the prompt; Q_l; h_l of the answer]        P_l (n, d) and Q_l (m, d) are learned

    P_l = diag(u_l) V_l, and so is Q_l; V_l trains. u_l is the root mean square of each vector at the start

h_0 are the embeddings, h_l the output of block l. That of the last block is not replaced: no other token reads it.
The vectors start as what the base computes at tokens put there: at first the model is PreEmbed with these tokens.
Activations in the last layers are 100 times as large as in the embedding, and those of the first token are larger
still. So each vector is learned in units of its own size u_l.

The prefix-layer baseline of the LoRA paper, https://arxiv.org/abs/2106.09685.
Trains layers * (prefix_length + infix_length) * d parameters. Does not fold: the vectors are part of what is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.data.batches import Batch, framed
from litpeft.methods.pre_embed import PreEmbed
from litpeft.methods.prompt import VirtualTokens, uniform
from litpeft.model.context import Context
from litpeft.model.delta import deltas_of
from litpeft.model.gpt import GPT

ROWS = 16  # whose mean activations after the prompt are the start


class Activations(VirtualTokens):
    """Learned vectors in units of their size at the start."""

    def __init__(self, width: int, before: int, after: int):
        super().__init__(width, uniform(0.5), before, after)
        self.tensor("unit", (before + after, 1), 1.0, trains=False)

    def table(self) -> Tensor:
        return self.unit * self.vectors


@dataclass
class PreLayer(PreEmbed):
    """Learned vectors before the text and after its prompt, in place of what each layer computes there."""

    name: ClassVar[str] = "pre_layer"

    prefix_length: int = 8
    """Vectors before the text, in each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: list[Tensor] = []  # what the base computes there (n + m, d), from the embedding upwards

    def tokens(self, width: int) -> VirtualTokens:
        return Activations(width, self.prefix_length, self.infix_length)

    def attach(self, model: GPT) -> None:
        super().attach(model)
        for block in model.blocks[:-1]:
            block.after_block.add(self.name, self.tokens(model.config.d_model))

    @torch.no_grad()
    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        before, after, sums, rows = self.prefix_length, self.infix_length, {}, 0
        embedded = super().tokens(model.config.d_model)
        model.after_embed.add(self.name, embedded.to(model.embed.weight.device))
        super().start_embedding(model, model.embed.weight)

        def add(number: int, y: Tensor) -> None:
            sums[number] = sums.get(number, 0) + torch.cat((y[0, :before], y[0, end - after : end])).double()

        for number, block in enumerate(model.blocks[:-1]):
            block.register_forward_hook(lambda block, given, y, number=number: add(number, y))
        for batch in islice(batches, ROWS):
            prompt = batch.prompt_lengths[0]
            ids = torch.tensor([framed(batch.ids[0].tolist(), prompt, before, after)], device=batch.ids.device)
            end = before + prompt + after
            model(ids, Context.packed((ids.size(1),), ids.device, (end,)), at=batch.at[:1])
            rows += 1
        self.found = [embedded.table().double(), *(sums[number] / rows for number in range(len(sums)))]

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        if not self.found:
            super().start_embedding(model, weight)
        for delta, start in zip(deltas_of(model, Activations), self.found, strict=False):
            size = start.square().mean(1, keepdim=True).sqrt()
            unit = torch.where(size > 0, size, 1.0)
            copy_shard(delta.unit, unit)
            copy_shard(delta.vectors, start / unit)
