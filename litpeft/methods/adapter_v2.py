"""LLaMA-Adapter V2: the prompts of LLaMA-Adapter, a factor and a bias on linear layers' outputs, and trained norms.

    y = (1 + scale) * (W x + b + bias)        scale (out,) = bias (out,) = 0, so nothing changes at first

The paper's factor is s = 1 + scale, held as its offset from 1: the same function.

LLaMA-Adapter V2 https://arxiv.org/abs/2304.15010 (its part for text).
Trains layers * (prompt_length * d + heads) parameters, 2 * out for each target, and the norms.
The prompts do not fold, so a run does not. The rest would: W <- (1 + scale) * W, b <- (1 + scale) * (b + bias).
"""

from dataclasses import dataclass, field

from litpeft.methods.adapter import Adapter
from litpeft.model.affine import Affine
from litpeft.model.delta import linears
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta, Linear


class ScaleBias(Delta):
    """(1 + scale) * (y + bias), with scale (out,) and bias (out,) zero at the start."""

    def __init__(self, out_features: int):
        super().__init__()
        self.tensor("scale", (out_features,), 0.0)
        self.tensor("bias", (out_features,), 0.0)

    def affine(self, linear: Linear) -> Affine:
        gain = 1 + self.scale
        return Affine(gain, shift=gain * self.bias)


@dataclass
class AdapterV2(Adapter):
    """Gated prompts, a factor and a bias for each output of linear layers, and trained norms."""

    unfreeze: tuple[str, ...] = field(default=("*norm*",), kw_only=True)
    """Globs of the base model's own parameters that train too."""
    targets: tuple[str, ...] = ("*.attn.*", "*.mlp.*")
    """Globs of the linear layers that get a factor and a bias for each output."""

    def attach(self, model: GPT) -> None:
        super().attach(model)
        for linear in linears(model, self.targets).values():
            linear.slot.add("adapter_v2", ScaleBias(linear.out_features))
