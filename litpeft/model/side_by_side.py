"""Attention and Mamba-2's layer side by side: both read a layer's input, and what they return is summed.

    y = attention_out * attention(attention_in * x) + state_out * mamba(state_in * x)

Falcon-H1 https://arxiv.org/abs/2507.22448.
"""

from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.multi_head import Attention
from litpeft.model.state_space import Mamba2


class AttentionAndMamba(Attention):
    """Attention, with Mamba's layer as `state`, which has linear layers and a core of its own."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.state = Mamba2(config, layer)
        self.factors = config.layer(layer).beside

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = super().forward(scaled(x, self.factors.attention_in), ctx)
        return scaled(y, self.factors.attention_out) + scaled(self.state(x, ctx), self.factors.state_out)


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
