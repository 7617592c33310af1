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
from litpeft.model.quantize.codes import BLOCK, code_table, dynamic_codes
from litpeft.model.quantize.four_bit import FP4, NF4, FourBit
from litpeft.model.slots import Linear, is_empty

SWITCHES = READ | {"qkv_bias"}  # of the model, that are heeded here
HALF = (torch.bfloat16, torch.float16)
FOUR_BITS = (NF4, FP4)


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
    cache, few = ctx.cache[block.layer], x.size(0) * x.size(1) <= kernels().TOKENS
    alike = {x.dtype, cache.k.dtype, ctx.rope[0].dtype} == {x.dtype} and ctx.rope[0].size(-1) == block.attn.head_dim
    contiguous = all(tensor.is_contiguous() for tensor in (x, ctx.pos, *ctx.rope, cache.k, cache.v))
    return few and alike and contiguous and takes(block, x.dtype)


def takes(block: FusedBlock, dtype: torch.dtype) -> bool:
    """Returns whether the linear layers have weights that the kernels read, no biases but of q, k, v, and no deltas."""
    attn, mlp = block.attn, block.mlp
    layers = (attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down)
    slots = (*(layer.slot for layer in layers), block.after_attn, block.after_mlp, block.after_block)
    if not all(map(is_empty, slots)) or attn.core.deltas or len({type(layer) for layer in layers}) > 1:
        return False
    if any((layer.bias is None) != (attn.q.bias is None) for layer in layers[:3]) or any(
        layer.bias is not None for layer in layers[3:]
    ):
        return False
    if any(layer.weight.data_ptr() % 16 for layer in layers):
        return False
    if type(attn.q) is Linear:
        return all(layer.weight.dtype == dtype for layer in layers)
    coded = type(attn.q) in FOUR_BITS and len({layer.double_quantize for layer in layers}) == 1
    norms = {block.norm1.weight.dtype, block.norm2.weight.dtype} == {dtype}
    return coded and norms and all(layer.in_features % BLOCK == 0 for layer in layers)


def held(layer: Linear) -> object:
    """Returns what holds a layer's weight, as the kernels take it."""
    return kernels().Weight(*(layer.packed().values() if isinstance(layer, FourBit) else (layer.weight,)))


def step(block: FusedBlock, x: Tensor, ctx: Context) -> Tensor:
    """Returns the block's output (B, T, d), and writes the new keys and values into the cache."""
    attn, mlp, cache = block.attn, block.mlp, ctx.cache[block.layer]
    norm1, norm2, layers, cached = block.norm1, block.norm2, (attn.q, attn.k, attn.v), (cache.k, cache.v)
    tables = None
    if isinstance(attn.q, FourBit):
        tables = kernels().Tables(code_table(attn.q.kind, x.device), dynamic_codes(x.device))
    heads = attn.q.out_features // attn.head_dim
    weights, biases = tuple(map(held, layers)), tuple(layer.bias for layer in layers)
    q = kernels().queries(x, norm1.weight, norm1.eps, heads, weights, biases, ctx.rope, ctx.pos, cached, tables)
    y = kernels().attended(q, ctx.pos, cached, block.attn.window)
    x = kernels().added(x, y.flatten(1), held(attn.o), "o", tables)
    y = kernels().swiglu(x, norm2.weight, norm2.eps, held(mlp.gate), held(mlp.up), mlp.gate.out_features, tables)
    return kernels().added(x, y, held(mlp.down), "down", tables)


def fuse_blocks(model: GPT) -> None:
    """Turns each block that allows it into a FusedBlock, in place."""
    if not at_defaults(model.config, SWITCHES) or not model.config.rotary_size:
        return
    for layer, block in enumerate(model.blocks):
        if is_llama(block):
            block.__class__, block.layer = FusedBlock, layer
