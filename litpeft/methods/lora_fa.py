"""LoRA-FA: LoRA whose first matrix stays as it was drawn, so that a layer need not keep its input for training.

    y = W x + b + s B A x        s = alpha / rank, or alpha / sqrt(rank) with rslora; A frozen

LoRA-FA https://arxiv.org/abs/2308.03303. With dropout the input is kept after all. A run saves A, too.
Trains rank * out parameters for each target. Folds: W <- W + s B A. In peft: LORA.
"""

from dataclasses import dataclass

from litpeft.methods.lora import LoRA, LowRank
from litpeft.model.gpt import GPT


@dataclass
class LoRAFA(LoRA):
    """Low-rank updates of which only the second matrix trains."""

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            delta = LowRank(*shape)
            delta.A.requires_grad_(False)
            self.fill(linear, "lora_fa", delta)
