"""Tied-LoRA: all blocks share one low-rank pair, which each block scales by vectors of its own.

    y = W x + b + s diag(v) B diag(u) A dropout(x)        s = alpha / rank

    A (rank, in) and B (out, rank) are the same in all blocks; u (rank,) and v (out,) belong to one

Tied-LoRA https://arxiv.org/abs/2311.09578. u is one at the start, and v is zero if it trains; if not, v is one and B
zero: nothing changes at first. Layers of one input (q, k, v; gate, up) share A and u, like the paper's fused layer.
Trains rank * (in + out) in all, and rank + out in each block. Folds: W <- W + s diag(v) B diag(u) A. In peft: LORA.
"""

from dataclasses import dataclass

from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.methods.lora import LARGEST_RANK, check_update
from litpeft.model.delta import Method, linears
from litpeft.model.gpt import GPT
from litpeft.model.slots import Bank, LowRankDelta, kaiming

ONE_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


class Pair(Bank):
    """A (rank, in) and B (sum of out, rank) of the layers with one input, for all blocks."""

    def __init__(self, rank: int, in_features: int, out_features: int, train: str):
        super().__init__()
        self.tensor("A", (rank, in_features), kaiming, "A" in train)
        self.tensor("B", (out_features, rank), kaiming if "v" in train else 0.0, "B" in train)


class Inner(Bank):
    """u (rank,) of the layers with one input, in one block."""

    def __init__(self, rank: int, train: str):
        super().__init__()
        self.tensor("u", (rank,), 1.0, "u" in train)


class Tied(LowRankDelta):
    """s diag(v) B diag(u) A x: v (out,) of its own, A and u of the layers with the same input, its rows of B."""

    def __init__(self, pair: Pair, inner: Inner, rows: slice, scale: float, dropout: float, train: str):
        super().__init__()
        self.banks, self.rows, self.scale, self.dropout = (pair, inner), rows, scale, dropout  # a tuple hides modules
        self.tensor("v", (rows.stop - rows.start,), 0.0 if "v" in train else 1.0, "v" in train)

    def factors(self) -> tuple[Tensor, Tensor]:
        pair, inner = self.banks
        return inner.u[:, None] * pair.A, self.scale * self.v[:, None] * pair.B[self.rows]


@dataclass
class TiedLoRA(Method):
    """One low-rank pair for all blocks, scaled by vectors of each block."""

    rank: int = 8
    """Rank of the update of one linear layer."""
    alpha: float | None = None
    """Scale of the update is alpha / rank; default 2 * rank."""
    dropout: float = 0.0
    """Share of the update's input that is dropped in training."""
    targets: tuple[str, ...] = ("*.attn.q", "*.attn.k", "*.attn.v")
    """Globs of the linear layers that get an update."""
    train: str = "ABuv"
    """Which of A, B, u and v train; the others stay at their start. B or v must."""

    def __post_init__(self) -> None:
        check_least(self, "method.", rank=1, most=LARGEST_RANK)
        check_update(self)
        if not set(self.train) <= set("ABuv") or not set(self.train) & set("Bv"):
            what = f'method.train must be letters of "ABuv", B or v among them, got "{self.train[:40]}"'
            raise ValueError(f"{what}: what starts at zero must train")

    def attach(self, model: GPT) -> None:
        places = {}  # the targets of each input of each block
        for name, linear in linears(model, self.targets).items():
            block, _, leaf = name.rpartition(".")
            if ".attn" not in block and ".mlp" not in block:
                raise ConfigError(f"{name} is in no block: it has nothing to share", where="method.targets")
            places.setdefault((block, ONE_INPUT.get(leaf, leaf)), []).append((leaf, linear))
        scale = (2 * self.rank if self.alpha is None else self.alpha) / self.rank
        for (block, kind), layers in places.items():
            outputs = sum(linear.out_features for _, linear in layers)
            if f"tied_lora_{kind}" not in model.banks:
                model.banks[f"tied_lora_{kind}"] = Pair(self.rank, layers[0][1].in_features, outputs, self.train)
            pair = model.banks[f"tied_lora_{kind}"]
            if len(pair.B) != outputs:
                raise ConfigError("the targets must be the same in all blocks", where="method.targets")
            inner = model.banks[f"tied_lora_{block.split('.')[1]}_{kind}"] = Inner(self.rank, self.train)
            at = 0
            for _, linear in layers:
                rows = slice(at, at := at + linear.out_features)
                linear.slot.add("tied_lora", Tied(pair, inner, rows, scale, self.dropout, self.train))
