"""BitFit: the biases learn, and nothing else.

    y = W x + b + d        d (out,) = 0 at the start, so nothing changes at first

BitFit https://arxiv.org/abs/2106.10199. Biases of norms train themselves; the update of a linear layer's bias is a
tensor of its own, so that layers with and without a bias are alike.
Trains out parameters for each target, and the width for each norm with a bias. Folds: b <- b + d.
"""

from dataclasses import dataclass
from typing import Any

from litpeft.core.errors import ConfigError
from litpeft.model.affine import Affine
from litpeft.model.delta import Method, linears
from litpeft.model.gpt import GPT
from litpeft.model.norms import LayerNorm
from litpeft.model.slots import Delta, Linear


class Shift(Delta):
    """y + d, with d (out,) zero at the start."""

    def __init__(self, out_features: int):
        super().__init__()
        self.tensor("d", (out_features,), 0.0)

    def affine(self, linear: Linear) -> Affine:
        return Affine(shift=self.d)


@dataclass
class BitFit(Method):
    """The biases of linear layers and norms train, and nothing else."""

    targets: tuple[str, ...] = ("*.attn.*", "*.mlp.*")
    """Globs of the linear layers whose biases train."""
    norms: bool = True
    """The biases of norms train too, where they have one."""
    add_missing: bool = False
    """Give targets without a bias one that starts at zero; most Llamas have no bias at all."""

    def attach(self, model: GPT) -> None:
        layers = linears(model, self.targets).values()
        norms = [
            module
            for module in model.modules()
            if isinstance(module, LayerNorm) and self.norms and module.bias is not None
        ]
        biased = [layer for layer in layers if layer.bias is not None or self.add_missing]
        if not biased and not norms:
            hint = "--method.add_missing true gives each target one that starts at zero"
            raise ConfigError("this model has no biases to train", where="method.targets", hint=hint)
        for layer in biased:
            layer.slot.add("bitfit", Shift(layer.out_features))
        for norm in norms:
            norm.bias.requires_grad_(True)

    def configure(self, config: dict[str, Any]) -> None:
        if self.add_missing:
            config |= {"attention_bias": True, "mlp_bias": True}
