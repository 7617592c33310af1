"""GLoRA: the weight and the bias of a layer learn a factor and a summand each, in forms that a search chooses.

    y = (W + W * A + B) x + b + b * D + E + W C        * number by number

    A, B: of low rank, (out, r) (r, in); or a number for each output; or one number; or none

    C: of low rank, (in, r) (r, 1); or a number for each input; or none

    D, E: a number for each output; or one number; or none. Without a bias b there is no D

    all start at zero, so nothing changes at first

The forms of a term share its numbers: those of the outputs are the first column of the low-rank form, and the one
number is the first of them. A path is one of 432 in each layer; how it is found is said in searched.py. (In the paper
no steps are left after the search: it draws paths for 500 epochs.)

GLoRA https://arxiv.org/abs/2306.07967.
Trains 2 rank * (in + out) + rank * (in + 1) + 2 out parameters for each target. Folds: W <- W + W * A + B,
b <- b + b * D + E + W C, so the merged layer has a bias.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from litpeft.core.kinds import check_least
from litpeft.methods.lora import LARGEST_RANK
from litpeft.methods.searched import Path, Searched, SearchedMethod
from litpeft.model.affine import Affine, as_product
from litpeft.model.delta import deltas_of, linears
from litpeft.model.gpt import GPT
from litpeft.model.slots import Linear, kaiming

FORMS = ("low_rank", "vector", "scalar", "none")
TERMS = {"A": FORMS, "B": FORMS, "C": ("low_rank", "vector", "none"), "D": FORMS[1:], "E": FORMS[1:]}


class Generalized(Searched):
    """(W * A + B) x + b * D + E + W C, each term in the form that `path` says."""

    claims = "the weight itself"

    def __init__(self, linear: Linear, rank: int, forms: dict[str, Path]):
        super().__init__(forms if linear.bias is not None else forms | {"D": ("none",)}, FORMS)
        out, inputs, self.rank = linear.out_features, linear.in_features, rank
        self.shapes = {"A": (out, inputs), "B": (out, inputs), "C": (inputs, 1), "D": (out,), "E": (out,)}
        for name, allowed in self.forms.items():
            rows, *columns = self.shapes[name]
            if allowed != ("none",):
                self.tensor(f"{name}d", (rows, rank if "low_rank" in allowed else 1) if columns else (rows,), 0.0)
            if "low_rank" in allowed:
                self.tensor(f"{name}u", (rank, *columns), kaiming)

    def factors_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Returns two matrices whose product is A, B or C; None where no form is allowed."""
        if self.forms[name] == ("none",):
            return None
        gate, d = self.gates(name), self.get_parameter(f"{name}d")
        left, right = gate[1] * d[:, :1] + gate[2] * d[0, 0], d.new_ones(1, self.shapes[name][1])
        if "low_rank" not in self.forms[name]:
            return left, right
        return torch.cat((gate[0] * d, left), 1), torch.cat((self.get_parameter(f"{name}u"), right))

    def vector(self, name: str) -> Tensor | None:
        """Returns D or E (out,); None where no form is allowed."""
        if self.forms[name] == ("none",):
            return None
        gate, d = self.gates(name), self.get_parameter(f"{name}d")
        return gate[1] * d + gate[2] * d[0]

    def affine(self, linear: Linear) -> Affine:
        weight, (a, b, c) = linear.dense().to(self.path.dtype), (self.factors_of(name) for name in "ABC")
        d, e = self.vector("D"), self.vector("E")
        shift = [] if d is None else [linear.bias * d]
        shift += [] if e is None else [e]
        shift += [] if c is None else [(weight @ c[0] @ c[1])[:, 0]]
        left, right = (None, None) if b is None else b
        if a is not None:
            change = weight * (a[0] @ a[1])
            left, right = as_product(change if b is None else torch.addmm(change, *b))
        return Affine(A=right, B=left, shift=sum(shift) if shift else None)

    def count(self, path: Path) -> int:
        shapes = zip(self.shapes.values(), path, strict=True)
        return sum({"low_rank": self.rank * sum(n), "vector": n[0], "scalar": 1, "none": 0}[form] for n, form in shapes)


@dataclass
class GLoRA(SearchedMethod):
    """Factors and summands of weights and biases, in forms that are searched for on held-out rows."""

    kind: ClassVar[type[Searched]] = Generalized
    training_only: ClassVar[tuple[str, ...]] = ("limit", "population", "generations", "search_after", "seed")

    rank: int = 8
    """Rank of the low-rank forms."""
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The forms that a term may take, e.g. {"A": ["vector", "none"], "C": ["none"]}; other terms may take all."""
    targets: tuple[str, ...] = ("*.attn.*", "*.mlp.*")
    """Globs of the linear layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", rank=1, most=LARGEST_RANK)
        for name, allowed in self.forms.items():
            if name not in TERMS or not allowed or not set(allowed) <= set(TERMS[name]):
                known = "; ".join(f"{term}: {', '.join(forms)}" for term, forms in TERMS.items())
                raise ValueError(f"method.forms.{name[:40]} must name forms of these terms ({known}), got {allowed}")
        named = {term: self.forms.get(term, forms) for term, forms in TERMS.items()}
        self.allowed = {term: tuple(form for form in FORMS if form in forms) for term, forms in named.items()}

    @property
    def searches(self) -> bool:
        return any(len(forms) > 1 for forms in self.allowed.values())

    def attach(self, model: GPT) -> None:
        for linear in linears(model, self.targets).values():
            linear.slot.add("glora", Generalized(linear, self.rank, self.allowed))
        self.check_limit(deltas_of(model, Generalized))

    def configure(self, config: dict[str, Any]) -> None:
        if any(self.allowed[term] != ("none",) for term in "CE"):
            config |= {"attention_bias": True, "mlp_bias": True}
