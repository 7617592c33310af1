"""Full finetuning: the model's own weights go on training, all of them or those that `unfreeze` names.

    W <- W - lr * update(dL/dW)        update: AdamW, or what train.optimizer says; W starts at the base's weights

ULMFiT https://arxiv.org/abs/1801.06146; weights that train in float32 https://arxiv.org/abs/1710.03740.
Trains every parameter that `unfreeze` names; an embedding that is also the head counts once. Folds: W is the result.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from litpeft.core.kinds import check_choices
from litpeft.core.safetensors import RESULT_DTYPES
from litpeft.model.delta import Method


@dataclass
class Full(Method):
    """The model's own weights train, all of them or those that globs name."""

    writes_model: ClassVar[bool] = True

    unfreeze: tuple[str, ...] = ("*",)
    """Globs of the model's parameters that train; the others stay as they are."""
    master_weights: bool = True
    """Hold trained weights in float32. False holds them in the type of base.precision: in bfloat16 half the memory of
    the weights, but a step that is smaller than their rounding is lost."""

    save_dtype: Literal[tuple(RESULT_DTYPES)] | None = None
    """Type of the result's weights; default: as they were held. A shorter one takes a
    part of what was learned, all of it where the steps were small."""

    def __post_init__(self) -> None:
        check_choices(self, "method.")

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return super().result_dtype(dtype) if self.save_dtype is None else RESULT_DTYPES[self.save_dtype]

    def trained_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return super().trained_dtype(dtype) if self.master_weights else dtype
