"""Prefix tuning: in every block the text also attends to learned keys and values that stand before it.

    softmax(q [P_k; k]^T / sqrt(D)) [P_v; v]        P_k, P_v (n, heads * D) in each block, at the positions 0 to n - 1

Prefix tuning https://arxiv.org/abs/2101.00190. P_k are not rotated: they are keys as attention reads them, the same
numbers as in other tools. The text begins at position n.
Trains layers * 2 * prompt_length * key/value heads * D parameters. Does not fold: attention reads the keys and values.
"""

from dataclasses import dataclass

from litpeft.core.kinds import check_least
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.methods.prompt import VirtualTokens
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT


@dataclass
class Prefix(Method):
    """Learned keys and values before the text, in every block."""

    prompt_length: int = 10
    """Keys and values of each block; the text that the model can read is shorter by as many tokens."""

    def __post_init__(self) -> None:
        check_least(self, "method.", prompt_length=1, most=LONGEST_PROMPT)

    def attach(self, model: GPT) -> None:
        for block in model.blocks:
            for linear in (block.attn.k, block.attn.v):
                linear.slot.add("prefix", VirtualTokens(self.prompt_length, linear.out_features, spread=0.1))
