"""Blocks for answering on a CPU, if methods act in linear layers only: the steps of gpt.py without its modules.

Looking up and calling a block's modules and slots takes a third of the time of a token on a CPU.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.generate.cpu.native_weights import NativeLinears
from litpeft.generate.cpu.pack import groups, owners
from litpeft.generate.cpu.packed_weights import PackedLinears
from litpeft.model.attention import attend
from litpeft.model.context import Context
from litpeft.model.gpt import GPT, Block
from litpeft.model.kernels import library
from litpeft.model.kernels.library import ALL, BlockStruct
from litpeft.model.kernels.ops import rotate
from litpeft.model.known_block import BIASES, READ, at_defaults, is_llama
from litpeft.model.slots import OFF

Acting = Literal["none", "all", "some", "by row"]  # deltas: by row, where several runs are beside the base
NATIVE_TOKENS = 512  # tokens of all rows that decode.cpp takes at once; for far more torch's attention is faster


class FusedBlock(Block):
    """A LLaMA block in which layers that read the same input are one matrix."""

    layer: int
    sizes: tuple[int, int, int]  # H, G, D
    window: int | None
    norms: tuple[tuple[Tensor, float], ...]  # of both: the weight, twice, and eps
    products: tuple[PackedLinears, ...]  # q, k, v; o; gate, up; down
    filled: PackedLinears | None  # the first with a delta; deltas are switched on and off in all slots alike
    wide_norms: list[Tensor]  # the weights of both in float32, for `native`
    native: dict[Acting, BlockStruct]  # the block as decode.cpp takes it, where that can compute it

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        acting = self.acting(ctx)
        native = self.native.get(acting) if ctx.cache is not None and x.numel() <= NATIVE_TOKENS * x.size(-1) else None
        if native is not None:
            cache, own = ctx.cache[self.layer], ctx.adapter if acting == "by row" else None
            return library().block(native, x, cache.k, cache.v, ctx.pos, ctx.rope, own)
        if self.filled is not None and not self.filled.covers_deltas:
            return super().forward(x, ctx)
        (norm1, norm2), (qkv, o, gate_up, down) = self.norms, self.products
        heads, kv_heads, size = self.sizes
        y = qkv.answer(_norm(x, *norm1)).view(*x.shape[:-1], heads + 2 * kv_heads, size).transpose(1, 2)
        y, v = y.split_with_sizes((heads + kv_heads, kv_heads), 1)
        q, k = rotate(y, *ctx.rope).split_with_sizes((heads, kv_heads), 1)
        if ctx.cache is not None:
            k, v = ctx.cache[self.layer].update(k, v, ctx)
        y = attend(q, k, v, mask=ctx.mask, documents=ctx.documents, window=self.window)
        x = x + o.answer(y.transpose(1, 2).flatten(2))
        gate, up = gate_up.answer(_norm(x, *norm2)).split_with_sizes(gate_up.sizes, -1)
        return x + down.answer(F.silu(gate).mul_(up))

    def acting(self, ctx: Context) -> Acting:
        """Returns which deltas act in a call."""
        if self.filled is None or self.filled.slot.deltas is OFF:
            return "none"
        if self.filled.runs and self.filled.slot.deltas is self.filled.deltas:
            return "none" if ctx.adapter is None else "by row"
        return "all" if self.filled.covers_deltas else "some"


def _native(block: FusedBlock, rotary_size: int) -> dict[Acting, BlockStruct]:
    """Returns the block as decode.cpp takes it, by the deltas that act; none if that cannot compute it."""
    size = block.sizes[2]
    if size % 32 or size > 256 or not all(isinstance(packed, NativeLinears) for packed in block.products):
        return {}
    block.wide_norms = [norm.weight.detach().float() for norm in (block.norm1, block.norm2)]
    rest = [norm.data_ptr() for norm in block.wide_norms]
    rest += [block.norm1.eps, block.norm2.eps, *block.sizes, rotary_size, block.window or ALL]
    structs = {"none": [packed.base for packed in block.products]}
    if block.filled is not None and block.filled.runs:
        structs["by row"] = [packed.of_runs(block.filled.runs) for packed in block.products]
    else:
        structs["all"] = [packed.tuned for packed in block.products]
    return {acting: BlockStruct(*products, *rest) for acting, products in structs.items()}


def _norm(x: Tensor, weight_twice: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight for x (..., d): the layer norm of (x, -x), whose mean is 0.

    On a CPU torch computes a layer norm in one step, an RMS norm in ten.
    """
    both = torch.cat((x, -x), -1)
    return F.layer_norm(both, weight_twice.shape, weight_twice, eps=eps)[..., : x.size(-1)]


def fuse_blocks(model: GPT) -> None:
    """Turns each block that allows it into a FusedBlock, in place; `pack_weights` comes before."""
    if not at_defaults(model.config, READ | BIASES) or not model.config.rotary_size:
        return
    replaced = owners(model, "weight", "bias")
    for layer, block in enumerate(model.blocks):
        products = _products(block)
        trained = block.norm1 in replaced or block.norm2 in replaced  # and can be switched off
        if products is None or trained:
            continue
        norms = (block.norm1, block.norm2)
        block.__class__, block.layer, block.window = FusedBlock, layer, block.attn.window
        block.sizes = model.config.n_heads, model.config.n_kv_heads, block.attn.head_dim
        block.norms = tuple((torch.cat((norm.weight, norm.weight)).to(model.dtype), norm.eps) for norm in norms)
        block.products, block.filled = products, next((one for one in products if one.slot is not None), None)
        block.native = _native(block, model.config.rotary_size)


def _products(block: Block) -> tuple[PackedLinears, ...] | None:
    """Returns the packed layers of a LLaMA block, or None if they do not compute all of it."""
    if not is_llama(block):
        return None
    linears = groups(block)
    products = tuple(group[0].packed_in for group in linears)
    pairs = zip(products, linears, strict=True)
    known = (p is not None and (p.covers_deltas or p.runs) and p.layers == group for p, group in pairs)
    return products if all(known) else None
