"""Prefix tuning: in every block the text also attends to learned keys and values that stand before it.

    softmax(q [P_k; k]^T / sqrt(D)) [P_v; v]        P_k, P_v (n, heads * D) in each block, at the positions 0 to n - 1
    P_k = tanh(E W^T + b) W_k^T + b_k               with `hidden`; P_v likewise. E (n, d), W (hidden, d) for all blocks,
                                                    W_k (heads * D, hidden) and b_k of each block's keys, or values

Prefix tuning https://arxiv.org/abs/2101.00190. P_k are not rotated: they are keys as attention reads them, the same
numbers as in peft. A model that norms, clamps or scales its keys does so with P_k, too, and then peft's differ. The
text begins at position n. Of a network a run's result keeps what it computes, P.
Trains layers * 2 * prompt_length * key/value heads * D parameters; with `hidden` those of the network,
prompt_length * d + hidden (d + 1) + layers * 2 * key/value heads * D (hidden + 1). Does not fold: attention reads the
keys and values. In peft: PREFIX_TUNING.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least, check_share
from litpeft.core.typed import LATER
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.methods.prompt import Placed, Start, VirtualTokens, uniform
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import Bank, kaiming

PLACE = "prefix"  # of the network's bank


class Network(Bank):
    """E (n, d), W (hidden, d) and b (hidden,), which all blocks share."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.tensor("E", (count, width), nn.init.normal_)
        self.tensor("W", (hidden, width), kaiming)
        self.tensor("b", (hidden,), uniform(width**-0.5))


def computed(E: Tensor, W: Tensor, b: Tensor, W_out: Tensor, b_out: Tensor) -> Tensor:
    """Returns the keys or values (n, heads * D) of a block."""
    with torch.autocast(E.device.type, enabled=False):  # in float32, as the result is computed
        return F.linear(torch.tanh(F.linear(E, W, b)), W_out, b_out)


class Projected(Placed):
    """Keys or values that a network computes from vectors."""

    def __init__(self, network: Network, width: int, dropout: float):
        count, hidden = len(network.E), len(network.W)
        super().__init__(count, dropout=dropout)
        self.network = (network,)  # a tuple hides the module
        self.tensor("W", (width, hidden), kaiming)
        self.tensor("b", (width,), uniform(hidden**-0.5))

    def table(self) -> Tensor:
        (network,) = self.network
        return computed(network.E, network.W, network.b, self.W, self.b)


@dataclass
class Prefix(Method):
    """Learned keys and values before the text, in every block."""

    prompt_length: int = 10
    """Keys and values of each block; the text that the model can read is shorter by as many tokens."""
    hidden: int | None = field(default=None, metadata=LATER)
    """Inner width of a network that computes them in training; default: they are learned as they are."""
    dropout: float = field(default=0.0, metadata=LATER)
    """Share of the keys' and values' numbers that is dropped in training."""

    def __post_init__(self) -> None:
        check_least(self, "method.", prompt_length=1, hidden=1, most=LONGEST_PROMPT)
        check_share(self, "method.", "dropout")

    def vectors_start(self) -> Start:
        """Returns how keys and values start that are learned as they are."""
        return uniform(0.1)

    def attach(self, model: GPT) -> None:
        hint, layers = "take another method, such as prompt or lora", [block.attn for block in model.blocks]
        if not all(layer.by_keys for layer in model.config.layers):
            what = "some layers of this model have no attention, or a state beside it: there tokens know earlier ones"
            what += " otherwise than by keys and values"
            raise ConfigError(what, where="method", hint=hint)
        if not layers[0].keys_and_values():
            what = "the attention of this model makes keys and values of shorter vectors: it has no attn.k and attn.v"
            raise ConfigError(what, where="method", hint=hint)
        if self.hidden is not None:
            network = model.banks[PLACE] = Network(self.prompt_length, model.config.d_model, self.hidden)
        for attn in layers:
            for linear in attn.keys_and_values():
                if self.hidden is None:
                    start = self.vectors_start()
                    delta = VirtualTokens(linear.out_features, start, self.prompt_length, dropout=self.dropout)
                else:
                    delta = Projected(network, linear.out_features, self.dropout)
                linear.slot.add("prefix", delta)

    def result(self, model: GPT, tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        if self.hidden is None:
            return self, tensors
        shared = [tensors.pop(f"banks.{PLACE}.{leaf}") for leaf in ("E", "W", "b")]
        for place, delta in model.named_modules():
            if isinstance(delta, Projected):
                tensors[f"{place}.vectors"] = computed(*shared, tensors.pop(f"{place}.W"), tensors.pop(f"{place}.b"))
        return replace(self, hidden=None), tensors
