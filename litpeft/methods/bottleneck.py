"""Bottleneck adapters: small two-layer networks inside each block, whose last layer starts at zero.

    y <- y + scale * (up act(down u + b_down) + b_up)        down (m, d), up (d, m) = 0, m = inner

The kinds differ in y, the output that is changed, and in u, the input of the network:

- houlsby: two networks in each block, one for the output of attention and one for that of the MLP; u = y.
- pfeiffer: y is the output of the MLP; u = y.
- lin: y is the output of the block; u = norm(y), with a norm of the network's own.
- parallel: y is the output of the MLP; u is the input of the MLP.

The outputs of attention and MLP are changed before they are added to the residual stream.

Houlsby https://arxiv.org/abs/1902.00751, Pfeiffer https://arxiv.org/abs/2005.00247, Lin
https://arxiv.org/abs/2004.03829, parallel https://arxiv.org/abs/2110.04366, without the lower blocks (specialised
AdapterDrop) https://arxiv.org/abs/2010.11918. All start at the base: up is zero, where Houlsby draws it near zero and
Lin as it comes. Houlsby and Lin train norms of the base or embeddings, too: `unfreeze`.
Trains 2 d m + m + d parameters for each adapter, and 2 d for the norm of lin. Does not fold: act is not linear.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_choices, check_least
from litpeft.core.typed import LATER
from litpeft.model.delta import Method
from litpeft.model.gpt import ACTIVATIONS, GPT
from litpeft.model.slots import Delta, kaiming

KINDS = {
    "houlsby": ("after_attn", "after_mlp"),
    "pfeiffer": ("after_mlp",),
    "lin": ("after_block",),
    "parallel": ("after_mlp",),
}


class BottleneckAdapter(Delta):
    """y + scale * (up act(down u + b_down) + b_up), with up (d, m) zero at the start."""

    def __init__(self, width: int, inner: int, kind: str, act: str, scale: float):
        super().__init__()
        self.parallel, self.act, self.scale = kind == "parallel", ACTIVATIONS[act], scale
        self.tensor("down", (inner, width), kaiming)
        self.tensor("down_bias", (inner,), 0.0)
        self.tensor("up", (width, inner), 0.0)
        self.tensor("up_bias", (width,), 0.0)
        if kind == "lin":
            self.tensor("norm", (width,), 1.0)
            self.tensor("norm_bias", (width,), 0.0)
        else:
            self.norm = None

    def forward(self, y: Tensor, *context: object) -> Tensor:
        u = context[0] if self.parallel else y  # the slots beside a sub-layer bring its input h
        if self.norm is not None:
            u = F.layer_norm(u, self.norm.shape, self.norm.to(u.dtype), self.norm_bias.to(u.dtype))
        inner = self.act(F.linear(u, self.down.to(u.dtype), self.down_bias.to(u.dtype)))
        update = F.linear(inner, self.up.to(inner.dtype), self.up_bias.to(inner.dtype))
        return y + (self.scale * update).to(y.dtype)


@dataclass
class Bottleneck(Method):
    """Small networks with a residual of their own, inside each block."""

    at_answers: ClassVar[tuple[str, ...]] = ("skip_layers",)

    kind: Literal["houlsby", "pfeiffer", "lin", "parallel"] = "houlsby"
    """Where they sit: after attention and MLP, after the MLP, after the block with a norm, or beside the MLP."""
    reduction_factor: int = 16
    """The model's width divided by the inner width of an adapter."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """What is between the two layers. Pfeiffer and Lin take relu."""
    scale: float = 1.0
    """What an adapter adds is multiplied by it; 4 in the paper of parallel adapters."""
    inner: int | None = field(default=None, metadata=LATER)
    """Inner width of an adapter; default: the model's width / reduction_factor."""
    skip_layers: int = field(default=0, metadata=LATER)
    """The first so many blocks get no adapter; more of them may be left out when a run answers."""

    def __post_init__(self) -> None:
        check_choices(self, "method.")
        check_least(self, "method.", reduction_factor=1, inner=1, skip_layers=0)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"method.scale must be above 0 and finite, got {self.scale}")

    def attach(self, model: GPT) -> None:
        width = model.config.d_model
        inner = self.inner or width // self.reduction_factor
        if self.skip_layers >= len(model.blocks):
            what = f"{self.skip_layers} leaves none of the {len(model.blocks)} blocks of this model"
            raise ConfigError(what, where="method.skip_layers")
        if not inner:
            what = f"{self.reduction_factor} is more than {width}, the width of this model"
            raise ConfigError(what, where="method.reduction_factor")
        for block in model.blocks[self.skip_layers :]:
            for place in KINDS[self.kind]:
                if (slot := getattr(block, place)) is not None:  # None: the block is attention or an MLP alone
                    slot.add("bottleneck", BottleneckAdapter(width, inner, self.kind, self.activation, self.scale))
