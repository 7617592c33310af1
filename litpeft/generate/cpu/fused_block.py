"""Blocks that only answer, and in which only linear layers were finetuned: the steps of model.py one after the other.

To find and call the modules of a block, and to ask each slot, takes a third of the time of one token on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.generate.cpu.native_weights import NativeRows
from litpeft.generate.cpu.pack import groups, owners
from litpeft.model.attention import attend
from litpeft.model.context import Context
from litpeft.model.gpt import GPT, Block
from litpeft.model.kernels import library
from litpeft.model.kernels.library import ALL, BlockStruct
from litpeft.model.kernels.ops import rotate
from litpeft.model.known_block import BIASES, READ, at_defaults, is_llama
from litpeft.model.slots import OFF, Rows

FEW = 512  # tokens of all rows that litpeft/model/kernels takes at once; of far more, torch's attention is faster


class BareBlock(Block):
    """A block of LLaMA's kind whose layers that read the same input are one matrix."""

    layer: int
    sizes: tuple[int, int, int]  # H, G, D
    window: int | None
    norms: tuple[tuple[Tensor, float], ...]  # weight, twice, and eps of both
    products: tuple[Rows, ...]  # with q, k and v; o; gate and up; down
    filled: Rows | None  # the first with a delta; what switches deltas on and off does so in all slots
    native: "NativeBlock | None" = None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.filled is not None and not self.filled.whole:  # some deltas are on and some off
            return super().forward(x, ctx)
        if self.native is not None and ctx.cache is not None and x.numel() <= FEW * x.size(-1):
            return self.native.answer(x, ctx)
        (norm1, norm2), (qkv, o, gate_up, down) = self.norms, self.products
        queries, shared, size = self.sizes
        y = qkv.answer(_norm(x, *norm1)).view(*x.shape[:-1], queries + 2 * shared, size).transpose(1, 2)
        y, v = y.split_with_sizes((queries + shared, shared), 1)
        q, k = rotate(y, *ctx.rope).split_with_sizes((queries, shared), 1)
        if ctx.cache is not None:
            k, v = ctx.cache[self.layer].update(k, v, ctx)
        y = attend(q, k, v, mask=ctx.mask, documents=ctx.documents, window=self.window)
        x = x + o.answer(y.transpose(1, 2).flatten(2))
        gate, up = gate_up.answer(_norm(x, *norm2)).split_with_sizes(gate_up.sizes, -1)
        return x + down.answer(F.silu(gate).mul_(up))


class NativeBlock:
    """A bare block as decode.cpp takes it. Holds its own norms; the rest belongs to the block's rows."""

    def __init__(self, block: BareBlock, turned: int):
        self.layer, self.products = block.layer, block.products
        self.filled = block.filled
        self.norms = tuple(norm.weight.detach().float() for norm in (block.norm1, block.norm2))
        rest = [norm.data_ptr() for norm in self.norms]
        rest += [block.norm1.eps, block.norm2.eps, *block.sizes, turned, block.window or ALL]
        self.base = BlockStruct(*(rows.base for rows in block.products), *rest)
        self.tuned = BlockStruct(*(rows.tuned for rows in block.products), *rest)

    @staticmethod
    def takes(block: BareBlock) -> bool:
        """Returns whether decode.cpp does all that a block does."""
        size = block.sizes[2]
        return all(isinstance(rows, NativeRows) for rows in block.products) and size % 32 == 0 and size <= 256

    def answer(self, x: Tensor, ctx: Context) -> Tensor:
        cache, off = ctx.cache[self.layer], self.filled is not None and self.filled.slot.deltas is OFF
        return library().block(self.base if off else self.tuned, x, cache.k, cache.v, ctx.pos, *ctx.rope)


def _norm(x: Tensor, weight_twice: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight for x (..., d): the layer norm of (x, -x), whose mean is 0.

    On a CPU torch has a layer norm in one step, and takes ten for a root mean square.
    """
    both = torch.cat((x, -x), -1)
    return F.layer_norm(both, weight_twice.shape, weight_twice, eps=eps)[..., : x.size(-1)]


def strip(model: GPT) -> None:
    """Makes each block bare, in place, that can be; pack.py comes before."""
    if not at_defaults(model.config, READ | BIASES) or not model.config.turned:
        return
    replaced = owners(model, "weight", "bias")
    for layer, block in enumerate(model.blocks):
        rows = _rows(block)
        trained = block.norm1 in replaced or block.norm2 in replaced  # and can be switched off
        if rows is None or trained:
            continue
        norms = (block.norm1, block.norm2)
        block.__class__, block.layer, block.window = BareBlock, layer, block.attn.window
        block.sizes = model.config.n_heads, model.config.n_kv_heads, block.attn.head_dim
        block.norms = tuple((torch.cat((norm.weight, norm.weight)).to(model.dtype), norm.eps) for norm in norms)
        block.products, block.filled = tuple(rows), next((one for one in rows if one.slot is not None), None)
        turned = model.config.turned
        block.native = NativeBlock(block, turned) if NativeBlock.takes(block) else None


def _rows(block: Block) -> list[Rows] | None:
    """Returns the packed layers of a block of LLaMA's kind, or None if there is more in it than they do."""
    if not is_llama(block):
        return None
    linears = groups(block)
    rows = [group[0].rows for group in linears]
    one = all(r is not None and r.whole and r.layers == group for r, group in zip(rows, linears, strict=True))
    return rows if one else None
