"""QA-LoRA: LoRA whose update is constant within the groups of an INT4, INT3 or INT2 base, so that it folds into them.

    y = W x + b + s B A pool(dropout(x))        W[o, k] = scale[o, G] q[o, k] + shift[o, G],  G = k // 32

pool(x) is the sum, or the mean, of each group of inputs. B A has one column for each group, so that merging adds it to
the shifts. Codes q and scales stay as they are, and the merged model is as small as the base was in training. (The
paper's zero points are -shift / scale.)

QA-LoRA https://arxiv.org/abs/2309.14717. Sum and mean are the same functions of x; an update that is learned with the
mean moves 32 times slower at the same learning rate.
Trains rank * (in / 32 + out) parameters for each target. Folds: shift <- shift + s B A, / 32 with the mean.
In peft: LORA.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_choices
from litpeft.methods.lora import LoRA
from litpeft.model.gpt import GPT
from litpeft.model.quantize.grouped import GROUP, Grouped
from litpeft.model.slots import LowRankDelta


class Pooled(LowRankDelta):
    """s B A pool(x), with A (rank, groups) random and B (out, rank) zero at the start."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, divisor: int):
        super().__init__()
        self.inputs, self.scale, self.dropout = in_features, scale / divisor, dropout
        self.tensor("A", (rank, -(-in_features // GROUP)), nn.init.xavier_uniform_)
        self.tensor("B", (out_features, rank), 0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        last = self.inputs - (self.A.size(1) - 1) * GROUP  # inputs of the last group, which may be a part of one
        each = self.A[:, :-1, None].expand(-1, -1, GROUP).flatten(1), self.A[:, -1:].expand(-1, last)
        return torch.cat(each, 1), self.scale * self.B  # a product with it pools


@dataclass
class QALoRA(LoRA):
    """Low-rank updates that are constant within the groups of a base in few bits."""

    pooling: Literal["sum", "mean"] = "sum"
    """What the update reads of each group of 32 inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "method.")

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            if not isinstance(linear, Grouped):
                what = "qa_lora learns one column for each group of a base that is quantised in groups of inputs"
                raise ConfigError(what, where="base.quantize", hint="set it to int4, int3 or int2, or take qlora")
            self.fill(linear, "qa_lora", Pooled(*shape, GROUP if self.pooling == "mean" else 1))
