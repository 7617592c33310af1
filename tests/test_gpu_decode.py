"""The block that answers on a GPU against the block of gpt.py: outputs, cached keys and values, and what it refuses.

Where there is no GPU, Triton's interpreter computes its kernels on the processor.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from model_switches import AWAY, CONFIG  # noqa: E402

from litpeft.generate.gpu import fused_block  # noqa: E402
from litpeft.generate.gpu.fused_block import SWITCHES, FusedBlock, fuse_blocks, handles, step  # noqa: E402
from litpeft.methods.lora import LoRA  # noqa: E402
from litpeft.model.config import ModelConfig  # noqa: E402
from litpeft.model.context import Context, KVCache  # noqa: E402
from litpeft.model.delta import attach  # noqa: E402
from litpeft.model.gpt import GPT  # noqa: E402
from litpeft.model.kernels import triton_decode as kernels  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter takes the bits of a bfloat16 in tl.dot for a whole number
HALF = torch.bfloat16 if GPU else torch.float16
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative
LLAMA = replace(CONFIG, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=192, n_layers=2)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and parts also of the small shapes here."""
    small = kernels.Tile(4, 64, 4, 1), kernels.Tile(16, 64, 4, 2)
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, small))
    monkeypatch.setattr(kernels, "KEYS", 16)
    monkeypatch.setattr(kernels, "SPAN", 32)
    monkeypatch.setattr(fused_block, "kernels", lambda: kernels)
    return


def made(config: ModelConfig, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for name, tensor in model.named_parameters():
        nn.init.normal_(tensor, mean=float("norm" in name), std=0.1)
    model.dtype = dtype
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def filled(model: GPT, rows: int, length: int) -> list[KVCache]:
    """Returns a cache of random keys and values."""
    layers = [KVCache(rows, length, model.config, model.dtype, DEVICE, n) for n in range(model.config.n_layers)]
    for tensor in (tensor for layer in layers for tensor in (layer.k, layer.v)):
        tensor.normal_()
    return layers


def ran(model: GPT, cache: list[KVCache], pos: Tensor, fused: bool) -> Tensor:
    """Returns what the blocks make of random inputs of tokens at `pos` (B, T)."""
    torch.manual_seed(2)
    x = torch.randn(*pos.shape, model.config.d_model, device=DEVICE).to(model.dtype)
    ctx = Context(pos, cache=cache, end=int(pos.max()) + 1)
    model.complete(ctx, model.kinds[0], x)
    with torch.inference_mode():
        for block in model.blocks:
            if fused:
                assert type(block) is FusedBlock
                assert handles(block, x, ctx)
                x = step(block, x, ctx)
            else:
                x = block(x, ctx)
    return x


def assert_alike(config: ModelConfig, dtype: torch.dtype, pos: Tensor, length: int = 128) -> None:
    """The output and all of the cache are those of the plain block in float64, as near as those of `dtype` can be."""
    plain, pos = made(config, dtype), pos.to(DEVICE)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    given = filled(plain, len(pos), length)
    found, wide = copy.deepcopy(given), copy.deepcopy(given)
    for layer in wide:
        layer.k, layer.v = layer.k.double(), layer.v.double()
    got = ran(fused, found, pos, True)
    plain.dtype = torch.float64
    want = ran(plain.double(), wide, pos, False)
    assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm()
    for own, true in zip(found, wide, strict=True):
        for tensor, exact in ((own.k, true.k), (own.v, true.v)):
            assert (tensor.double() - exact).norm() <= LIMITS[dtype] * exact.norm()
            untouched = torch.ones(len(pos), length, dtype=torch.bool, device=DEVICE).scatter_(1, pos, False)
            assert torch.equal(tensor.transpose(1, 2)[untouched].double(), exact.transpose(1, 2)[untouched])


def positions(rows: int, tokens: int = 1) -> Tensor:
    """Returns (B, T) positions that differ from row to row."""
    return (torch.arange(rows)[:, None] * 37 + 5) % 100 + torch.arange(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (16, 1), (1, 16), (2, 5)])
def test_it_computes_what_the_block_computes(rows: int, tokens: int, dtype: torch.dtype) -> None:
    assert_alike(LLAMA, dtype, positions(rows, tokens))


SHAPES = {
    "head of 24, nothing a multiple of a tile": {"d_model": 72, "n_heads": 3, "n_kv_heads": 1, "head_dim": 24},
    "head of 64": {"head_dim": 64},
    "head of 96": {"head_dim": 96, "n_heads": 2, "n_kv_heads": 1},
    "head of 128": {"head_dim": 128, "n_heads": 2, "n_kv_heads": 2},
    "many heads share a key": {"n_heads": 40, "n_kv_heads": 2, "head_dim": 16},
    "odd width": {"d_ff": 171},
    "biases of q, k and v": {"qkv_bias": True},
    "window": {"window": 6},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_of_every_shape(name: str, rows: int) -> None:
    assert_alike(replace(LLAMA, n_layers=1, **SHAPES[name]), torch.float32, positions(rows))


@pytest.mark.parametrize("last", [0, 1, 15, 16, 63, 127])
def test_at_any_position(last: int) -> None:
    assert_alike(replace(LLAMA, n_layers=1), torch.float32, torch.tensor([[last], [127 - last]]))


def test_sums_do_not_change_from_time_to_time_or_with_the_rows_beside() -> None:
    model = made(LLAMA, HALF)
    fuse_blocks(model)
    cache = filled(model, 16, 128)
    first, again = (ran(model, copy.deepcopy(cache), positions(16).to(DEVICE), True) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", [None, *AWAY])
def test_another_model_is_left_alone(name: str | None) -> None:
    model = GPT(CONFIG if name is None else replace(CONFIG, **{name: AWAY[name]}))
    fuse_blocks(model)
    assert (type(model.blocks[0]) is FusedBlock) == (name is None or name in SWITCHES)


def test_what_it_does_not_take_goes_through_the_modules() -> None:
    model = made(LLAMA, torch.float32)
    fuse_blocks(model)
    block, cache, pos = model.blocks[0], filled(model, 1, 128), torch.tensor([[3]], device=DEVICE)
    x = torch.randn(1, 1, model.config.d_model, device=DEVICE)
    ctx = Context(pos, cache=cache, end=4)
    model.complete(ctx, model.kinds[0], x)
    with torch.no_grad():
        assert handles(block, x, ctx)
        assert not handles(block, x.double(), ctx)
        assert not handles(block, x, replace(ctx, cache=None))
        assert not handles(block, x, replace(ctx, rope=tuple(one[..., :16] for one in ctx.rope)))
        many = torch.randn(1, 17, model.config.d_model, device=DEVICE)
        assert not handles(block, many, ctx)
        block.mlp.down.bias = nn.Parameter(torch.zeros(model.config.d_model, device=DEVICE), False)
        assert not handles(block, x, ctx)
        block.mlp.down.bias = None
        attach(model, LoRA(rank=2, targets=("*.attn.q",)))
        assert not handles(block, x, ctx)
    assert not handles(model.blocks[1], x, ctx)  # with autograd
