"""The places where a finetuning method can act. Each is the identity until a method fills it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.model.affine import Affine
from litpeft.model.context import Context
from litpeft.model.kernels.low_rank import Factors, add_updates, apply_affines
from litpeft.model.kernels.ops import product
from litpeft.model.recompute import dropout

Start = float | Callable[[Tensor], object]  # of a tensor: the number that it is filled with, or a function that does


def kaiming(tensor: Tensor) -> None:
    """Fills a matrix with random numbers as nn.Linear does."""
    nn.init.kaiming_uniform_(tensor, a=5**0.5)


class Stated(nn.Module):
    """A module that states its tensors, each with its shape and its start.

    Hold another module, in a tuple that hides it, never its tensors: FSDP swaps them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, Start] = {}
        self.for_training: set[str] = set()  # buffers that checkpoints hold, and results do not

    def tensor(self, name: str, shape: tuple[int, ...], start: Start, trains: bool = True) -> None:
        """Adds a parameter in float32 that starts at a number, or as a function fills it."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32), trains))
        self.starts[name] = start

    def buffer(self, name: str, shape: tuple[int, ...], start: Start, kept: str) -> None:
        """Adds a tensor in float32 that is no parameter; it is `kept` in a "result", a "checkpoint", or "nowhere"."""
        self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=kept != "nowhere")
        self.starts[name] = start
        self.for_training |= {name} if kept == "checkpoint" else set()

    def reset_parameters(self) -> None:
        """Fills the tensors, in their order. Fabric and FSDP call it: what reads other modules is `Method.start`'s."""
        for name, tensor in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            if name not in self.starts:
                raise NotImplementedError(f"{type(self).__name__} must initialise {name}")
            start = self.starts[name]
            start(tensor) if callable(start) else nn.init.constant_(tensor, start)


class Delta(Stated):
    """What a method puts into a slot. It owns its new tensors; no Delta holds another Delta."""

    claims: ClassVar[str] = ""  # in words: what it does that only one Delta of a slot can do
    lr_factors: Mapping[str, float] = {}  # what the learning rate of its tensors is multiplied by, if not by 1
    dropout: float = 0.0  # share of x that is dropped in training
    virtual_tokens: int = 0  # first positions of each document whose contents it writes
    infix_tokens: int = 0  # and positions between its prompt and its answer
    at_prompt: bool = False  # whether where it acts depends on the length of the prompt
    stretch: float = 1.0  # in GPT.rope: how many times as many tokens the model can read
    unlike_peft: ClassVar[str] = ""  # in words: how peft's method of this kind differs, where there is one
    vanishes: ClassVar[bool] = False  # outside of training it does nothing but what `Method.configure` writes down

    def factors(self) -> Factors | None:
        """Returns A (rank, in) and B (out, rank), differentiably, if it does nothing but add B A dropout(x)."""

    def affine(self, linear: "Linear") -> Affine | None:
        """Returns what this Delta in `linear.slot` does to W x + b, differentiably, in float32 or better.

        Answering and merging use it, too. None: it acts on activations, defines `forward`, and cannot be merged.
        """

    def peft(self) -> dict[str, Tensor] | None:
        """Returns its tensors under peft's names, without reading the base; None: peft computes nothing like it.

        Of lora_B `self.scale` is left out: peft has it in its config, as lora_alpha / r.
        """

    def off(self) -> "Delta | None":
        """Returns what acts in its place while it is switched off: what it took out of the base, if anything."""

    def forward(self, y: Tensor, x: Tensor, linear: "Linear", ctx: Context | None) -> Tensor:
        return apply_affines([y], x, [self.affine(linear)])[0]


class LowRankDelta(Delta):
    """y + B A dropout(x): a method states A and B, and everything else follows from them."""

    scale: float = 1.0  # that B has, of what is learned

    def __init_subclass__(cls) -> None:
        if cls.forward is not LowRankDelta.forward:
            raise TypeError(f"{cls.__name__} must be a Delta: what it does is not said by its factors alone")

    def factors(self) -> Factors:
        raise NotImplementedError(f"{type(self).__name__} must state A (rank, in) and B (out, rank)")

    def forward(self, y: Tensor, x: Tensor, linear: "Linear", ctx: Context | None) -> Tensor:
        """The definition. Layers call `add_updates` instead, which computes the same faster."""
        x = F.dropout(x, self.dropout, self.training)
        x, a, b = (tensor.to(y.dtype) for tensor in (x, *self.factors()))
        return y + x @ a.T @ b.T

    def affine(self, linear: "Linear") -> Affine:
        a, b = self.factors()
        return Affine(A=a, B=b)

    def peft(self) -> dict[str, Tensor]:
        a, b = self.factors()
        return {"lora_A": a, "lora_B": b / self.scale}


class Bank(Stated):
    """Tensors that several deltas share."""


OFF: dict[str, Delta] = {}  # the `deltas` of every slot while all are switched off


class Slot(nn.Module):
    """A place where deltas act one after the other. An empty one returns its first argument."""

    takes_one: ClassVar[bool] = False  # Delta at most

    def __init__(self) -> None:
        super().__init__()
        self.deltas: dict[str, Delta] = self._modules  # those that are on; without_delta replaces them for a time

    def add(self, name: str, delta: Delta) -> None:
        """Appends a Delta; its tensors are called SLOT.NAME.TENSOR."""
        for other, there in self.deltas.items():
            if name == other or self.takes_one or (delta.claims and delta.claims == there.claims):
                what = f"{name} and {other} want the same place: both {delta.claims or 'go by one name'}"
                raise ConfigError(what, where="method", hint="choose one of them, or other targets")
        self.add_module(name, delta)

    @property
    def virtual_tokens(self) -> int:
        """Returns how many first positions of each document its deltas write."""
        return max([0, *(delta.virtual_tokens for delta in self.deltas.values())])

    @property
    def infix_tokens(self) -> int:
        """Returns how many positions between the prompt and the answer of each document its deltas write."""
        return max([0, *(delta.infix_tokens for delta in self.deltas.values())])

    @property
    def stretch(self) -> float:
        """Returns how many times as many tokens its deltas let the model read."""
        return math.prod(delta.stretch for delta in self.deltas.values())

    def factors(self) -> Factors | None:
        """Returns A and B if the deltas do nothing but add B A x, without dropout."""
        pairs = [None if d.dropout and d.training else d.factors() for d in self.deltas.values()]
        if not pairs or None in pairs:
            return None
        return pairs[0] if len(pairs) == 1 else (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))

    @torch.no_grad()
    def frozen(self, linear: "Linear") -> Affine | None:
        """Returns `affine`, without autograd."""
        return self.affine(linear)

    def affine(self, linear: "Linear") -> Affine | None:
        """Returns the composition of all deltas, differentiably; None if one of them is no affine map."""
        composed = Affine()
        for delta in self.deltas.values():
            affine = delta.affine(linear)
            if affine is None:
                return None
            composed = affine.after(composed)
        return composed

    def forward(self, y: Tensor, *context: object) -> Tensor:
        for delta in self.deltas.values():
            y = delta(y, *context)
        return y


def is_empty(module: nn.Module) -> bool:
    """Returns whether a module is a slot without deltas."""
    return type(module) is Slot and not module.deltas


class Linear(nn.Linear):
    """y = slot(W x + b). A storage class (a quantised weight) overrides `base` and `dense` only."""

    stacks: ClassVar[tuple[str, ...]] = ("weight",)  # tensors with a row an output, from which `multiply` computes
    packed_in: Any = None  # a PackedLinears of generate/cpu, set there; layers that read the same input share one

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.slot = Slot()

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # torch would load its compiler to draw numbers for it, which nobody keeps
            super().reset_parameters()

    def base(self, x: Tensor) -> Tensor:
        """Returns W x + b of the frozen base: (..., in) -> (..., out)."""
        # a bias that trains is float32 whatever x is; for others this is a no-op
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product(x, self.weight, bias)

    def dense(self) -> Tensor:
        """Returns the weight (out, in) that `base` multiplies with."""
        return self.weight

    def write_dense(self, out: Tensor) -> None:
        """Writes the weight over `out` (out, in)."""
        out.copy_(self.dense())

    @classmethod
    def multiply(cls, x: Tensor, stacked: tuple[Tensor, ...], back: bool = False) -> Tensor | None:
        """Returns W x (..., out) without autograd; with `back`, the gradient (..., in) of x where x is that of W x.

        `stacked` are the tensors called `stacks` of one layer, or of several one after the other. For storages with a
        product of their own. None: the caller multiplies with `dense`.
        """
        return None

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the tensors that would hold a weight (out, in), by name; does not store them."""
        return {"weight": weight}

    def unpacked(self, packed: dict[str, Tensor]) -> Tensor:
        """Returns what `dense` would return if the layer held these tensors."""
        return packed["weight"].to(self.weight.dtype)

    def after(self, y: Tensor, x: Tensor, ctx: Context | None) -> Tensor:
        """Returns the slot's output for y = W x + b."""
        for delta in self.slot.deltas.values():
            factors = delta.factors()
            if factors is None:
                y = delta(y, x, self, ctx)
            else:
                y = add_updates([y], dropout(x, delta.dropout, delta.training), [factors])[0]
        return y

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        """`ctx` is None in the head, whose x are only some of the call's tokens."""
        return self.after(self.base(x), x, ctx)


def project(x: Tensor, ctx: Context | None, *layers: Linear) -> list[Tensor]:
    """Returns each layer's output for x; by one product if their weights are one matrix."""
    packed = layers[0].packed_in
    if packed is not None and packed is layers[-1].packed_in:
        covered = packed.covers_deltas
        ys = (packed.answer if covered else packed.product)(x).split_with_sizes(packed.sizes, -1)
        return ys if covered else [layer.after(y, x, ctx) for layer, y in zip(layers, ys, strict=True)]
    ys = [layer.base(x) for layer in layers]
    drops = any(delta.dropout and delta.training for layer in layers for delta in layer.slot.deltas.values())
    affines = [None if drops else layer.slot.affine(layer) for layer in layers]
    if None in affines:
        return [layer.after(y, x, ctx) for layer, y in zip(layers, ys, strict=True)]
    return apply_affines(ys, x, affines)


class Embedding(nn.Embedding):
    """Looks up a row of the weight for each token. A Delta of its slot folds as into a linear layer's weight (V, d)."""

    bias = None

    def __init__(self, number: int, width: int):
        super().__init__(number, width)
        self.slot = Slot()

    def dense(self) -> Tensor:
        return self.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.slot(super().forward(ids), ids, self)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class TiedHead(Linear):
    """The output head of a model whose embedding is its head: one parameter, owned by the embedding."""

    def __init__(self, embed: nn.Embedding):
        nn.Module.__init__(self)
        self.in_features, self.out_features = embed.embedding_dim, embed.num_embeddings
        self.embed = (embed,)  # a tuple hides the module, so that the weight is registered once
        self.register_parameter("bias", None)
        self.slot = Slot()

    def base(self, x: Tensor) -> Tensor:
        return product(x, self.dense())

    def dense(self) -> Tensor:
        return self.embed[0].weight
