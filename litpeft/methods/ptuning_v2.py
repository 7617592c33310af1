"""P-tuning v2: deep prompts. In every block the text also attends to learned keys and values that stand before it.

    softmax(q [P_k; k]^T / sqrt(D)) [P_v; v]        P_k, P_v (n, heads * D) in each block, drawn from N(0, 1)

P-tuning v2 https://arxiv.org/abs/2110.07602. It is prefix tuning (prefix.py) whose keys and values are learned as they
are, start large and are more; a network that computes them is an option.
Trains layers * 2 * prompt_length * key/value heads * D parameters. Does not fold: attention reads the keys and values.
In peft: PREFIX_TUNING.
"""

from dataclasses import dataclass

import torch.nn as nn

from litpeft.methods.prefix import Prefix
from litpeft.methods.prompt import Start


@dataclass
class PTuningV2(Prefix):
    """Learned keys and values before the text, in every block (deep prompts)."""

    prompt_length: int = 20
    """Keys and values of each block; the text that the model can read is shorter by as many tokens."""

    def vectors_start(self) -> Start:
        return nn.init.normal_
