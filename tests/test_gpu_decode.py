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
from litpeft.model.kernels import triton_decode_attention as attention  # noqa: E402
from litpeft.model.quantize import storage_class  # noqa: E402
from litpeft.model.quantize.codes import dequantize_in_torch  # noqa: E402
from litpeft.model.slots import Linear  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter takes the bits of a bfloat16 in tl.dot for a whole number
HALF = torch.bfloat16 if GPU else torch.float16
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative
LLAMA = replace(CONFIG, d_model=128, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128, n_layers=1)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and parts also of the small shapes here."""
    small = kernels.Tile(16, 64, 4, 1), kernels.Tile(32, 64, 4, 2)
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, small))
    monkeypatch.setattr(kernels, "CODED_TILES", dict.fromkeys(kernels.TILES, small))
    monkeypatch.setattr(attention, "KEYS", 16)
    monkeypatch.setattr(attention, "SPAN", 32)
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


def in_codes(model: GPT, kind: str, double_quantize: bool) -> tuple[GPT, GPT]:
    """Returns the model with its weights in codes, and one with the same weights unpacked."""
    coded, plain = copy.deepcopy(model), copy.deepcopy(model).double()
    for name, layer in model.blocks.named_modules():
        if type(layer) is Linear:
            other = coded.blocks.get_submodule(name)
            other.__class__ = storage_class(kind)
            other.convert(model.dtype, double_quantize)
            for key, tensor in other.pack(layer.weight).items():
                setattr(other, key, nn.Parameter(tensor, False))
            shape = [layer.out_features, layer.in_features]
            weight = dequantize_in_torch(other.weight, other.blocks(), shape, kind, torch.float64)
            plain.blocks.get_submodule(name).weight.data = weight
    return coded, plain


def assert_alike(
    config: ModelConfig, dtype: torch.dtype, pos: Tensor, length: int = 64, kind: str = "", nested: bool = False
) -> None:
    """The output and all of the cache are those of the plain block in float64, as near as those of `dtype` can be.

    With a `kind`, weights are in codes.
    """
    plain, pos = made(config, dtype), pos.to(DEVICE)
    fused, plain = in_codes(plain, kind, nested) if kind else (copy.deepcopy(plain), plain)
    fuse_blocks(fused)
    given = filled(fused, len(pos), length)
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
    return (torch.arange(rows)[:, None] * 37 + 5) % 48 + torch.arange(tokens)


# every pair of: rows, kind of weights, a window, biases, keys that queries share, uneven widths, dtype
PAIRS = [
    (1, "dense", True, False, True, True, torch.float32),
    (1, "nf4", False, True, True, False, HALF),
    (1, "nested", True, True, False, False, HALF),
    (3, "dense", False, True, False, False, HALF),
    (3, "nf4", True, False, True, False, HALF),
    (3, "nested", True, True, True, True, torch.float32),
    (16, "dense", True, False, False, True, HALF),
    (16, "nf4", False, True, False, True, torch.float32),
    (16, "nested", False, False, True, False, HALF),
]


@pytest.mark.parametrize(("rows", "kind", "window", "bias", "shared", "uneven", "dtype"), PAIRS)
def test_it_computes_what_the_block_computes(
    rows: int,
    kind: str,
    window: bool,
    bias: bool,
    shared: bool,
    uneven: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coded = kind != "dense"
    config = replace(LLAMA, window=6 if window else None, qkv_bias=bias, n_kv_heads=1 if shared else 2)
    if uneven:  # tiles; codes are in blocks of 64
        config = replace(config, d_model=64 if coded else 72, d_ff=192 if coded else 171)
        wide = kernels.Tile(16, 128, 4, 1), kernels.Tile(16, 128, 4, 2)
        monkeypatch.setattr(kernels, "CODED_TILES", dict.fromkeys(kernels.TILES, wide))
    assert_alike(config, dtype, positions(rows), kind="nf4" if coded else "", nested=kind == "nested")


@pytest.mark.parametrize(("rows", "tokens", "dtype"), [(1, 16, HALF), (2, 5, torch.float32)])
def test_of_several_tokens_a_row(rows: int, tokens: int, dtype: torch.dtype) -> None:
    assert_alike(LLAMA, dtype, positions(rows, tokens))


SHAPES = {
    "head of 24": {"n_heads": 3, "head_dim": 24},
    "many heads share a key": {"n_heads": 18, "head_dim": 8},
    "head of 96": {"head_dim": 96},
    "head of 128": {"head_dim": 128},
}


@pytest.mark.parametrize(("name", "rows"), [(name, 1 + 2 * (n % 2)) for n, name in enumerate(SHAPES)])
def test_of_every_shape(name: str, rows: int) -> None:
    assert_alike(replace(LLAMA, **SHAPES[name]), torch.float32, positions(rows))


@pytest.mark.parametrize("last", [0, 15, 48])
def test_at_any_position(last: int) -> None:
    assert_alike(LLAMA, torch.float32, torch.tensor([[last], [63 - last]]))


@pytest.mark.full
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (1, 16)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_in_codes(kind: str, nested: bool, rows: int, tokens: int) -> None:
    for dtype in (torch.float32, HALF):
        assert_alike(LLAMA, dtype, positions(rows, tokens), kind=kind, nested=nested)


def test_sums_do_not_change_from_time_to_time() -> None:
    model = made(replace(LLAMA, n_layers=2), HALF)
    fuse_blocks(model)
    cache = filled(model, 2, 64)
    first, again = (ran(model, copy.deepcopy(cache), positions(2).to(DEVICE), True) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", [None, *AWAY])
def test_another_model_is_left_alone(name: str | None) -> None:
    model = GPT(CONFIG if name is None else replace(CONFIG, **{name: AWAY[name]}))
    fuse_blocks(model)
    assert (type(model.blocks[0]) is FusedBlock) == (name is None or name in SWITCHES)


def test_what_it_does_not_take_goes_through_the_modules() -> None:
    model = made(replace(LLAMA, n_layers=2), torch.float32)
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
