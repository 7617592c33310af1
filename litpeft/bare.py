"""Blocks that only answer, and in which nothing but weights has changed: the steps of model.py one after the other.

To find and call the modules of a block, and to ask each slot, takes a third of the time of one token on a CPU.
"""

import torch.nn.functional as F
from torch import Tensor

from litpeft.attention import attend
from litpeft.model import GPT, Block, Context, RMSNorm
from litpeft.ops import rms_norm, rotate
from litpeft.slots import Delta, Rows


class BareBlock(Block):
    """A block of LLaMA's kind whose layers that read the same input are one matrix."""

    layer: int
    sizes: tuple[int, int, int]  # H, G, D
    window: int | None
    norms: tuple[tuple[Tensor, float], ...]  # weight and eps of both
    products: tuple[Rows, ...]  # with q, k and v; o; gate and up; down

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        (norm1, norm2), (qkv, o, gate_up, down) = self.norms, self.products
        queries, shared, size = self.sizes
        y = qkv.answer(rms_norm(x, *norm1)).view(*x.shape[:-1], queries + 2 * shared, size).transpose(1, 2)
        y, v = y.split_with_sizes((queries + shared, shared), 1)
        q, k = rotate(y, *ctx.rope).split_with_sizes((queries, shared), 1)
        if ctx.cache is not None:
            k, v = ctx.cache[self.layer].update(k, v, ctx)
        y = attend(q, k, v, mask=ctx.mask, documents=ctx.documents, window=self.window)
        x = x + o.answer(y.transpose(1, 2).flatten(2))
        gate, up = gate_up.answer(rms_norm(x, *norm2)).split_with_sizes(gate_up.sizes, -1)
        return x + down.answer(F.silu(gate).mul_(up))


def strip(model: GPT) -> None:
    """Makes each block bare, in place, that can be: packed (storage/packed.py), of LLaMA's kind, no slot but its linear
    layers' filled, and those with what can be done at once."""
    for layer, block in enumerate(model.blocks):
        attn, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
        llama = isinstance(block.norm1, RMSNorm) and not block.parallel and mlp.gate is not None and mlp.act is F.silu
        if not llama or not model.config.turned:
            continue
        groups = [[attn.q, attn.k, attn.v], [attn.o], [mlp.gate, mlp.up], [mlp.down]]
        linears = [linear for group in groups for linear in group]
        others = {m for m in block.modules() if isinstance(m, Delta)} - {linear.slot for linear in linears}
        rows = [group[0].rows for group in groups]
        if not others and all(
            r is not None and r.whole and r.layers == group for r, group in zip(rows, groups, strict=True)
        ):
            block.__class__, block.layer, block.window = BareBlock, layer, attn.window
            block.sizes = model.config.n_heads, model.config.n_kv_heads, attn.head_dim
            block.norms = tuple((norm.weight, norm.eps) for norm in norms)
            block.products = tuple(rows)
