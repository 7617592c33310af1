"""PreEmbed: embeddings of special tokens are learned, which stand before the text and after its prompt.

    x = [P; embed(prompt); Q; embed(answer)]        P (n, d) and Q (m, d) are learned

The prefix-embedding baseline of the LoRA paper, https://arxiv.org/abs/2106.09685. It is prompt tuning with tokens in a
second place.
Trains (prefix_length + infix_length) * d parameters. Does not fold: the vectors are part of what the model reads.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litpeft.core.kinds import check_least
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.methods.prompt import VirtualTokens, copy_tokens, uniform
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT


@dataclass
class PreEmbed(Method):
    """Learned vectors before the text and after its prompt, in place of tokens."""

    name: ClassVar[str] = "pre_embed"

    prefix_length: int = 20
    """Vectors before the text."""
    infix_length: int = 8
    """Vectors between the prompt and its answer."""

    def __post_init__(self) -> None:
        check_least(self, "method.", prefix_length=0, infix_length=0, most=LONGEST_PROMPT)
        if not self.prefix_length + self.infix_length:
            raise ValueError("method.prefix_length and method.infix_length must not both be 0")

    def tokens(self, width: int) -> VirtualTokens:
        """Returns a Delta with so many learned vectors."""
        return VirtualTokens(width, uniform(0.5), self.prefix_length, self.infix_length)

    def attach(self, model: GPT) -> None:
        model.after_embed.add(self.name, self.tokens(model.config.d_model))

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        copy_tokens(model.after_embed.deltas[self.name].vectors, weight, [])
