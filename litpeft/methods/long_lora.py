"""LongLoRA: LoRA for texts that are longer than the base can read, trained with attention in groups of tokens.

    y = W x + b + s B A dropout(x)        rotary angles of position t as of t / factor (position interpolation)

In training a document is cut into groups, and a token attends only to those of its own group (S2 attention). For the
second half of the heads the cuts are half a group later, so that groups learn of each other. No token sees a later one:

    heads of the first half    |-- group --|-- group --|-- group --|-- rest --|
    heads of the second half   |half|-- group --|-- group --|-- group --|rest-|

Answers are written with plain attention over all tokens. Norms and embeddings train, too.

LongLoRA https://arxiv.org/abs/2309.12307; its code rolls the tokens instead, so that the first half group sees the end.
Trains rank * (in + out) parameters for each target, the norms and the embedding. Folds: W <- W + s B A, and the
config.json of the merged model has the factor.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.methods.lora import LoRA
from litpeft.model.attention import Documents, attend
from litpeft.model.context import Context
from litpeft.model.gpt import GPT
from litpeft.model.multi_head import Attention
from litpeft.model.rope import interpolated
from litpeft.model.slots import Delta

LARGEST_FACTOR = 1024


class Shifted(Delta):
    """In training attention within groups of tokens, shifted by half a group for the second half of the heads."""

    claims, vanishes = "the attention", True

    def __init__(self, group: int):
        super().__init__()
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, attn: Attention) -> Tensor:
        documents = ctx.documents or Documents((q.size(2),) * len(q))  # without packing each row is one
        half = self.group // 2
        trains = self.training and torch.is_grad_enabled() and ctx.mask is None
        if not trains or max(documents.lengths) <= half:  # then no group has an end within a document
            return attend(q, k, v, mask=ctx.mask, documents=ctx.documents, **attn.kind())
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        rows = [x.transpose(0, 1).flatten(1, 2)[None].tensor_split(2, 1) for x in (q, k, v)]  # (1, H / 2, B * T, D)
        cuts = documents.cut(self.group, self.group), documents.cut(half, self.group)
        sinks = (None, None) if attn.sinks is None else attn.sinks.tensor_split(2)
        kinds = (attn.kind() | {"sinks": half} for half in sinks)
        parts = zip(cuts, kinds, *rows, strict=True)
        ys = [attend(*heads, mask=None, documents=cut, **kind) for cut, kind, *heads in parts]
        return torch.cat(ys, 1)[0].unflatten(1, (len(q), -1)).transpose(0, 1)


class Stretch(Delta):
    """Sets positions `stretch` times as close, and lets the model read as many more."""

    vanishes = True

    def __init__(self, stretch: float):
        super().__init__()
        self.stretch = stretch

    def forward(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.stretch


@dataclass
class LongLoRA(LoRA):
    """Low-rank updates, norms and embeddings, for texts longer than the base can read."""

    unfreeze: tuple[str, ...] = field(default=("*norm*", "embed.weight"), kw_only=True)
    """Globs of the base model's own parameters that train too."""
    factor: float = 2.0
    """How many times as many tokens the model is to read; its positions are interpolated by as much."""
    group_size: int | None = None
    """Tokens that attend to each other in training; default a quarter of the tokens that the model is to read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", factor=1, most=LARGEST_FACTOR)
        check_least(self, "method.", group_size=2)

    def attach(self, model: GPT) -> None:
        scaling = model.config.rope_scaling
        if model.config.layers or not model.config.rotary_size or (scaling is not None and scaling.kind != "linear"):
            what = "long_lora interpolates rotary positions that are plain or scaled evenly, and this model has no such"
            raise ConfigError(what, where="base.dir", hint="take another base, or lora")
        super().attach(model)
        model.rope.add("long_lora", Stretch(self.factor))
        group = self.group_size or max(2, model.max_positions // 4)
        for block in model.blocks:
            block.attn.core.add("long_lora", Shifted(group))

    def configure(self, config: dict[str, Any]) -> None:
        interpolated(config, self.factor)
