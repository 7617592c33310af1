"""A mixture of experts: a router chooses a few MLPs for each token, and their outputs are summed by its shares.

    y = sum over the chosen j of s_j expert_j(x)        s = softmax(R x), with R (experts, d)

With groups a token first chooses some groups of experts, by their largest score. Where a correction is added to the
scores for the choice, s are sigmoids, and a group counts by the sum of its two largest.

Letters: N tokens, d model width, E experts, k of them for each token.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.recompute import again


class Statics(nn.Module):
    """What is added to scores (N, E) for the choice."""

    def __init__(self, experts: int):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(1, experts))


class ExpertBias(nn.Module):
    """The same, under the name that LFM2's files have."""

    def __init__(self, experts: int):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(experts))


class Router(nn.Linear):
    """The shares of a token's experts. No `slots.Linear`: methods leave it alone, and it is never quantised."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.d_model, config.experts.number, config.experts.router_bias)
        self.kind = config.experts
        if self.kind.corrected:  # what it is in the files; it has no gradient
            self.register_buffer("e_score_correction_bias", torch.zeros(self.kind.number))
        self.statics = Statics(self.kind.number) if self.kind.statics else None
        self.apart = ExpertBias(self.kind.number) if self.kind.apart else None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shares and numbers of the chosen experts, both (N, k), for x (N, d)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.to(wide) if self.kind.wide_router else x
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        logits = nn.functional.linear(rows, self.weight.to(rows.dtype), bias)
        sigmoids = self.kind.corrected or self.kind.sigmoids
        scores = logits.to(wide).sigmoid() if sigmoids else logits.softmax(-1, dtype=wide)
        chosen = self.choose(scores)
        shares = scores.gather(-1, chosen)
        if self.kind.normed:
            total = shares.sum(-1, keepdim=True) + self.kind.sum_plus
            shares = shares / total.clamp(min=self.kind.least_sum)
        return (shares * self.kind.scale).to(x.dtype), chosen

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the numbers of the chosen experts (N, k) for scores (N, E)."""
        if self.kind.corrected:
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        if self.statics is not None:
            scores = scores + self.statics.e_score_correction_bias.to(scores.dtype)
        if self.apart is not None:
            scores = scores + self.apart.expert_bias.to(scores.dtype)
        if self.kind.groups > 1:
            groups = scores.unflatten(-1, (self.kind.groups, -1))
            of_groups = groups.topk(2).values.sum(-1) if self.kind.corrected else groups.amax(-1)
            kept = of_groups.topk(self.kind.active_groups).indices
            left_out = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, kept, False)
            scores = groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.kind.active).indices


def spread(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """Returns the row of each pair of token and expert (N k, d), in this order of the pairs."""
    return rows[:, None].expand(-1, k, -1).flatten(0, 1)[order]


def unsorted(outputs: Tensor, order: Tensor) -> Tensor:
    """Returns what the experts made of each pair (N k, d), in the order of the tokens."""
    return torch.empty_like(outputs).index_copy(0, order, outputs)


class ShareOfAll(nn.Linear):
    """What the shared expert adds for a token: y sigmoid(g x). As the router, no `slots.Linear`."""

    def __init__(self, width: int):
        super().__init__(width, 1, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x and y are (..., d)."""
        return y * nn.functional.linear(x, self.weight.to(x.dtype)).sigmoid()


class Mixture(nn.Module):
    """Experts in place of an MLP, one after the other, each on the tokens that chose it."""

    def __init__(self, config: ModelConfig, make_expert: Callable[[ModelConfig, int], nn.Module]):
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(make_expert(config, config.experts.d_ff) for _ in range(config.experts.number))
        shared = config.experts.shared_d_ff
        self.shared = None if shared is None else make_expert(config, shared)
        self.shared_gate = ShareOfAll(config.d_model) if config.experts.shared_gate else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Returns y (..., d). In training experts without a token run on zeros, so that all have a gradient."""
        rows, zeros = x.flatten(0, -2), x.new_zeros(1, x.size(-1))
        shares, chosen = self.router(rows)
        order = chosen.flatten().argsort(stable=True)  # the N k pairs of token and expert, by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        inputs = again(spread, rows, order, chosen.size(1)).split(counts)
        trains, pairs = torch.is_grad_enabled(), zip(self.experts, inputs, strict=True)
        pairs = [(expert, part) for expert, part in pairs if len(part) or trains]
        outputs = torch.cat([expert(part if len(part) else zeros, None)[: len(part)] for expert, part in pairs])
        y = again(unsorted, outputs, order).view(*chosen.shape, -1)
        y = (shares[..., None] * y).sum(1).view(x.shape)
        if self.shared is None:
            return y
        return y + (self.shared(x, ctx) if self.shared_gate is None else self.shared_gate(x, self.shared(x, ctx)))
