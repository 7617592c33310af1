"""How many numbers a block keeps of each token for its backward pass: an estimate from its layers.

    none     of LoRA on all layers of a Llama:  4 d + 2 (H + G) D + 2 F
    cheap                                       2 d + 2 (H + G) D + 2 F
    block                                       d; in fused blocks 2 d
    offload                                     as block, in host memory

and with dropout, under none, for each layer that has it once more its input, and which of it was dropped: a byte a
number on a GPU. Letters: d model width, H query heads, G key/value heads, D head size, F width of the MLP.
"""

from dataclasses import dataclass
from math import prod

import torch.nn as nn
import torch.nn.functional as F

from litpeft.model.affine import Affine
from litpeft.model.chunks import OTHERS, SIZES, STEPS
from litpeft.model.gpt import MLP, Block
from litpeft.model.latent import LatentAttention
from litpeft.model.linear_attention import GatedDeltaNet
from litpeft.model.mixture import Mixture
from litpeft.model.multi_head import Attention
from litpeft.model.short_convolution import ShortConvolution
from litpeft.model.side_by_side import AttentionAndMamba
from litpeft.model.slots import Linear
from litpeft.model.state_space import Mamba2
from litpeft.model.xielu import XIELU


@dataclass(frozen=True)
class Kept:
    """What the blocks of a run keep, in numbers of `itemsize` bytes a token."""

    cheap: bool  # no results of norms, activations and dropout
    itemsize: int
    gpu: bool = False
    longest: int = 0  # tokens of a document, of which attention without a fused kernel keeps every score

    def of(self, block: Block) -> float:
        """Returns what a block keeps of a token, unless it is checkpointed."""
        attn, mlp, shared = block.attn, block.mlp, block.norm2 is None
        kept, reads = 0.0, [] if mlp is None else _first(mlp)
        norms = [(reads, block.norm2)] if mlp is not None and not shared else []
        if attn is not None:
            first, *inner, last = attn.inputs()
            kept = self.attention(attn) + sum(self.input(group) for group in inner)
            twice = not self.gpu and self.itemsize > 2  # attention there copies its output
            kept += self.input(last, fresh=twice, cheap=False)
            norms = [(first + reads * shared, block.norm1), *norms]
        # 1. the residual stream before attention and before the MLP, and what norms make of it
        d = next(layer.in_features for layer in block.modules() if isinstance(layer, nn.Linear))  # reads the stream
        for layers, norm in norms:
            normed = not isinstance(norm, nn.Identity)
            kept += d * (normed and not (block.parallel and norm is block.norm2))
            kept += self.input(layers, cheap=normed)
        kept += d * sum(norm is not None for norm in (block.post_norm1, block.post_norm2))
        # 2. the MLP, or the experts of a token
        if mlp is None:
            return kept
        if not isinstance(mlp, Mixture):
            return kept + self.mlp(mlp, True)
        expert = self.mlp(mlp.experts[0], False) + self.input(_first(mlp.experts[0])) + d * (1 if self.cheap else 2)
        return kept + mlp.router.kind.active * expert + (0 if mlp.shared is None else self.mlp(mlp.shared, True))

    def attention(self, attn: Attention | GatedDeltaNet | ShortConvolution | Mamba2) -> float:
        """Returns what is kept of queries, keys, values, and what attention makes of them."""
        if isinstance(attn, GatedDeltaNet | ShortConvolution | Mamba2):
            kept = sum(linear.out_features for linear in attn.inputs()[0])
            if isinstance(attn, ShortConvolution):
                return kept
            tokens = STEPS * (OTHERS if self.gpu else SIZES["cpu"])[0]  # for which a matrix is kept, in float32
            return kept + prod(attn.sizes.matrices) * max(4, self.itemsize) / self.itemsize / tokens
        if isinstance(attn, AttentionAndMamba):
            state = attn.state.inputs()
            return self.heads(attn) + self.attention(attn.state) + sum(self.input(group) for group in state)
        return self.heads(attn)

    def heads(self, attn: Attention) -> float:
        """Returns what is kept where there are queries, keys and values."""
        queries = attn.o.in_features
        if isinstance(attn, LatentAttention):  # keys and values of all heads, padded to one size
            heads = (attn.q if attn.q_b is None else attn.q_b).out_features
            ranks = attn.kv_b.in_features + (0 if attn.q_b is None else attn.q_b.in_features)
            return 3 * heads + queries + ranks
        of_layers = [linear.out_features for linear in attn.keys_and_values()]
        kept = 2.0 * queries + sum(of_layers)
        kept += queries * (attn.q_norm is not None) + sum(of_layers[:1]) * (attn.k_norm is not None)
        if attn.cap is not None or attn.sinks is not None:  # no fused kernel has them: scores and shares, in float32
            scores = queries // attn.head_dim * self.longest * max(4, self.itemsize) / self.itemsize
            kept += sum(of_layers) + scores * (1 if attn.cap is None else 2)
        return kept

    def mlp(self, mlp: MLP, light: bool) -> float:
        """Returns what is kept of the outputs of the first layers and of what is made of them."""
        first, last = mlp.inputs()
        width, light = last[0].in_features, light and mlp.act is F.silu
        kept = width * len(first) + self.input(last, fresh=not light)
        if not (self.cheap or mlp.act is F.silu or mlp.gate is None):
            kept += width * (1 if mlp.clamped is None else 4)  # the activation; clamped, up + 1, sigmoid, a product
        if not self.cheap and isinstance(mlp.act, XIELU):
            kept += 2 * width  # its parts
        return kept

    def input(self, layers: list[Linear], fresh: bool = True, cheap: bool = True) -> float:
        """Returns what layers keep beside the sum that autograd needs: of their input, if it is a tensor of its own.

        `cheap` says that it is a result that is not kept under `cheap`.
        """
        kept, reads = 0.0, False
        for layer in layers:
            reads |= layer.weight.requires_grad
            for delta in layer.slot.deltas.values():
                factors = delta.factors()
                affine = delta.affine(layer) if factors is None else Affine(A=factors[0], B=factors[1])
                a = None if affine is None else affine.A
                kept += 0 if a is None else len(a)
                kept += layer.out_features * (affine is not None and affine.gain is not None)
                if delta.dropout and a is not None:
                    kept += 0 if self.cheap else layer.in_features * (1 + (1 / self.itemsize if self.gpu else 1))
                else:
                    reads |= a is not None and a.requires_grad
        fresh = fresh and not (cheap and self.cheap)
        return kept + layers[0].in_features if layers and reads and fresh else kept


def _first(mlp: nn.Module) -> list[Linear]:
    """Returns the layers that read the input of an MLP; of a mixture those of its shared expert."""
    mlp = mlp.shared if isinstance(mlp, Mixture) else mlp
    return [] if mlp is None else mlp.inputs()[0]


def copies(block: Block, itemsize: int, cheap: bool) -> int:
    """Returns the bytes of the copies, rounded or scaled, of what trains, which the backward pass reads."""
    bytes_ = 0
    for layer in block.modules():
        if isinstance(layer, Linear):
            pairs = [factors for delta in layer.slot.deltas.values() if (factors := delta.factors()) is not None]
            bytes_ += itemsize * sum(a.numel() + b.numel() for a, b in pairs)
            rounded = layer.weight.requires_grad and layer.weight.itemsize > itemsize and not cheap
            bytes_ += itemsize * layer.weight.numel() * rounded
    return bytes_
