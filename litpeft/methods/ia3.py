"""IA3: factors inhibit or amplify the keys, the values and the MLP's inner activations.

    k = g_k * (W_k x + b)        v = g_v * (W_v x + b)        y = W_down (g * act(W_gate x) * (W_up x + b))

    g (out,) = 1 at the start, so nothing changes at first

The factors inside the MLP multiply the output of `up`: with a gate this equals the paper's factors on the input of
`down`, and scales rows of a weight, as for keys and values.

IA3 https://arxiv.org/abs/2205.05638. Trains out parameters for each target. Folds: W <- diag(g) W, b <- g * b.
In peft: IA3.
"""

from dataclasses import dataclass

from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.model.affine import Affine
from litpeft.model.delta import Method, linears
from litpeft.model.gpt import GPT, MLP
from litpeft.model.slots import Delta, Linear


class Scale(Delta):
    """g * y, with g (out,) one at the start."""

    def __init__(self, out_features: int):
        super().__init__()
        self.tensor("g", (out_features,), 1.0)

    def affine(self, linear: Linear) -> Affine:
        return Affine(gain=self.g)

    def peft(self) -> dict[str, Tensor]:
        return {"ia3_l": self.g}


@dataclass
class IA3(Method):
    """Factors on keys, values and the inner activations of the MLP."""

    targets: tuple[str, ...] = ("*.attn.k", "*.attn.v", "*.mlp.up")
    """Globs of the linear layers that get a factor for each output."""

    def attach(self, model: GPT) -> None:
        layers = linears(model, self.targets)
        for mlp in (m for m in model.modules() if isinstance(m, MLP) and m.gate is None):
            if mlp.up in layers.values():
                what = (
                    "the MLP of this model has no gate, so factors before its activation are not the paper's, after it"
                )
                hint = """--method.targets '["*.attn.k", "*.attn.v"]' leaves them out"""
                raise ConfigError(what, where="method.targets", hint=hint)
        for linear in layers.values():
            linear.slot.add("ia3", Scale(linear.out_features))
