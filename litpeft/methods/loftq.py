"""LoftQ: LoRA on a quantised base, where codes and update are chosen together to come near the weight.

    Q_t = q(W - s B_(t-1) A_(t-1)),   s B_t A_t = the largest singular parts of W - Q_t,   t = 1 to T

    y = Q_T x + b + s B A dropout(x)        A = A_T and B = B_T at the start, which is nearer to the base than q(W) is

LoftQ https://arxiv.org/abs/2310.08659; without the factor 1 / sqrt(s) of A and B, which its code forgets, the start
would be off by s. A_(T-1) and B_(T-1) are saved too: a run makes Q_T again from the base's files with them.
Trains rank * (in + out) parameters for each target. Folds: W <- Q_T + s B A.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.methods.pissa import PiSSA
from litpeft.model.delta import Held
from litpeft.model.gpt import GPT
from litpeft.model.kernels.low_rank import Factors
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.singular import largest

MOST_ITERATIONS = 1000


@dataclass
class LoftQ(PiSSA):
    """LoRA on a quantised base, whose codes are chosen with the start of the update."""

    name: ClassVar[str] = "loftq"

    training_only: ClassVar[tuple[str, ...]] = (*PiSSA.training_only, "iterations")

    iterations: int = 5
    """Times that codes and update are made in turn, T."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", iterations=1, most=MOST_ITERATIONS)

    def attach(self, model: GPT) -> None:
        for linear, _ in self.shapes(model).values():
            if not isinstance(linear, Quantized):
                what = f"{self.name} chooses the codes of a quantised base, and this base is not held in codes"
                raise ConfigError(what, where="base.quantize", hint="set it to nf4, or take pissa or lora")
        super().attach(model)

    def parts(self, name: str, weight: Tensor, rank: int, held: Held) -> tuple[Factors, Factors]:
        taken = update = weight.new_zeros(rank, weight.size(1)), weight.new_zeros(len(weight), rank)
        for _ in range(self.iterations):
            taken = update
            codes = held(weight - taken[1] @ taken[0])
            update = largest(weight - codes, rank)
        return taken, update
