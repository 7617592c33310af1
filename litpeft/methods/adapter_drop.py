"""AdapterDrop: bottleneck adapters of which a run may leave out those of the first n blocks when it answers.

    n ~ U{0, ..., N} in each optimizer step; blocks 1 to n are those of the base in it, the others have their adapters

A block without adapters costs what the base's block costs, and below the first adapter there is no backward pass. The
adapters, and the specialised form with one n from the start (`skip_layers`), are those of `bottleneck`.

AdapterDrop https://arxiv.org/abs/2010.11918.
Trains 2 d m + m + d parameters for each adapter. Does not fold: the activation is not linear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.methods.bottleneck import Bottleneck
from litpeft.model.delta import without_delta
from litpeft.model.gpt import GPT


@dataclass
class AdapterDrop(Bottleneck):
    """Small networks inside each block, trained so that those of the first blocks can be left out."""

    idle_parts: ClassVar[bool] = True

    kind: Literal["houlsby", "pfeiffer", "lin", "parallel"] = "pfeiffer"
    """Where they sit: after attention and MLP, after the MLP, after the block with a norm, or beside the MLP."""
    most_dropped: int | None = None
    """The most first blocks that a step leaves out, N; default: all but the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", most_dropped=1)

    def attach(self, model: GPT) -> None:
        super().attach(model)
        if self.most_dropped is not None and self.most_dropped >= len(model.blocks):
            what = f"{self.most_dropped} leaves none of the {len(model.blocks)} blocks of this model"
            raise ConfigError(what, where="method.most_dropped")

    @contextmanager
    def training_step(self, model: GPT, draws: Random) -> Iterator[None]:
        most = len(model.blocks) - 1 if self.most_dropped is None else self.most_dropped
        with without_delta(model.blocks[: draws.randint(0, most)], "bottleneck"):
            yield
