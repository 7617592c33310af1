"""Full finetuning: the model's own weights go on training, all of them or those that `unfreeze` names.

    W <- W - lr * update(dL/dW)        update: AdamW, or what train.optimizer says; W starts at the base's weights

ULMFiT https://arxiv.org/abs/1801.06146; weights that train in float32 https://arxiv.org/abs/1710.03740.
Trains every parameter that `unfreeze` names; an embedding that is also the head is one. Folds: W is what it learned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from litpeft.methods.base import Method


@dataclass
class Full(Method):
    """The model's own weights train, all of them or those that globs name."""

    writes_model: ClassVar[bool] = True

    unfreeze: tuple[str, ...] = ("*",)
    """Globs of the model's parameters that train; the others stay as they are."""
    master_weights: bool = True
    """Hold what trains in float32. False holds it in the type of base.precision: in bfloat16 half the memory of the
    weights, but a step that is smaller than their rounding is lost."""

    def trained_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return super().trained_dtype(dtype) if self.master_weights else dtype
