"""Blocks for answering on a GPU: a few new tokens with a KV cache go through the kernels of triton_decode.py.

They read each weight once and little else. Whatever they do not take goes through the modules of gpt.py.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from litpeft.model.context import Context
from litpeft.model.gpt import GPT, Block
from litpeft.model.kernels import gpu_kernels
from litpeft.model.known_block import READ, at_defaults, is_llama
from litpeft.model.slots import Linear, is_empty

SWITCHES = READ | {"qkv_bias"}  # of the model, that are heeded here
HALF = (torch.bfloat16, torch.float16)


@cache
def kernels() -> ModuleType | None:
    """Returns triton_decode.py, or None where Triton cannot be used."""
    if gpu_kernels() is None:
        return None
    from litpeft.model.kernels import triton_decode

    return triton_decode


class FusedBlock(Block):
    """A LLaMA block that answers with few kernels."""

    layer: int

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        fits = x.is_cuda and x.dtype in HALF and kernels() is not None
        return step(self, x, ctx) if fits and handles(self, x, ctx) else super().forward(x, ctx)


def handles(block: FusedBlock, x: Tensor, ctx: Context) -> bool:
    """Returns whether all that the block would do with x (B, T, d) is done by `step`."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or ctx.cache is None or ctx.rope is None:
        return False
    held, few = ctx.cache[block.layer], x.size(0) * x.size(1) <= kernels().TOKENS
    alike = {x.dtype, held.k.dtype, ctx.rope[0].dtype} == {x.dtype} and ctx.rope[0].size(-1) == block.attn.head_dim
    contiguous = all(tensor.is_contiguous() for tensor in (x, ctx.pos, *ctx.rope, held.k, held.v))
    return few and alike and contiguous and takes(block, x.dtype)


def takes(block: FusedBlock, dtype: torch.dtype) -> bool:
    """Returns whether the linear layers have plain weights of this type, no biases but of q, k and v, and no deltas."""
    attn, mlp = block.attn, block.mlp
    layers = (attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down)
    slots = (*(layer.slot for layer in layers), block.after_attn, block.after_mlp, block.after_block)
    if not all(map(is_empty, slots)) or attn.core.deltas:
        return False
    plain = all(type(layer) is Linear and layer.weight.dtype == dtype for layer in layers)
    biases = {layer.bias is None for layer in layers[:3]}
    return plain and len(biases) == 1 and all(layer.bias is None for layer in layers[3:])


def step(block: FusedBlock, x: Tensor, ctx: Context) -> Tensor:
    """Returns the block's output (B, T, d), and writes the new keys and values into the cache."""
    attn, mlp, held = block.attn, block.mlp, ctx.cache[block.layer]
    (norm1, norm2), layers, cached = (block.norm1, block.norm2), (attn.q, attn.k, attn.v), (held.k, held.v)
    weights, biases = tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)
    q = kernels().queries(x, norm1.weight, norm1.eps, weights, biases, ctx.rope, ctx.pos, cached)
    y = kernels().attended(q, ctx.pos, cached, block.attn.window)
    x = kernels().added(x, y.flatten(1), attn.o.weight, "o")
    y = kernels().swiglu(x, norm2.weight, norm2.eps, mlp.gate.weight, mlp.up.weight)
    return kernels().added(x, y, mlp.down.weight, "down")


def fuse_blocks(model: GPT) -> None:
    """Turns each block that allows it into a FusedBlock, in place."""
    if not at_defaults(model.config, SWITCHES) or not model.config.rotary_size:
        return
    for layer, block in enumerate(model.blocks):
        if is_llama(block):
            block.__class__, block.layer = FusedBlock, layer
