"""Weights in the layout of a CPU's matrix library are the same numbers, and answer the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_folder
from families.tiny_families import make_family
from packed_layers import FAST, make

from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import FusedBlock, _norm, fuse_blocks
from litpeft.generate.cpu.pack import KINDS, Packed, PackedTiedHead, pack_weights
from litpeft.generate.cpu.packed_weights import Int8Linears, OneDNNLinears, PackedLinears, can_pack
from litpeft.generate.engine import answer
from litpeft.generate.load import load_model
from litpeft.generate.settings import Sampling
from litpeft.methods.adapter import Adapter
from litpeft.methods.lora import LoRA, LowRank
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import delta_state, load_delta, without_delta
from litpeft.model.gpt import Block
from litpeft.model.quantize import Storage
from litpeft.model.slots import Delta, Linear, TiedHead

IDS = torch.arange(40).view(2, 20)
pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no products in bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (33, 7), (1, 1), (576, 1536)])
def test_packed_rows_have_the_weight_and_the_products_of_a_dense_layer(
    shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = Linear(shape[1], shape[0], bias).to(dtype).requires_grad_(False)
    if bias:
        layer.bias.data = layer.bias.float()  # as one that has been trained
    rows = OneDNNLinears([layer])
    assert torch.equal(rows.dense(), layer.weight)
    products_agree(rows, layer.weight, layer.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(64,), (96, 32, 32)])
@pytest.mark.parametrize(("name", "double"), FAST)
def test_rows_of_codes_multiply_as_their_unpacked_weights(
    name: str, double: bool, sizes: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layers = [make(name, double, torch.randn(size, 192), torch.bfloat16, bias) for size in sizes]
    kind = KINDS[type(layers[0])]
    if not kind.takes(layers[0]):
        pytest.skip("this build of bitsandbytes has no product with codes of four bits on this processor")
    weight = torch.cat([layer.dense() for layer in layers])
    rows = kind(layers)
    exact = name == "int8"  # the kernel for four bits wants the absmax in bfloat16
    assert (rows.dense() - weight).abs().max() <= (0 if exact else 2**-7 * weight.abs().max())
    products_agree(rows, rows.dense(), torch.cat([layer.bias for layer in layers]) if bias else None)


def products_agree(rows: PackedLinears, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for shape in ((1, 1), (1, 5), (3, 300)):
        x = torch.randn(*shape, weight.size(1)).bfloat16()
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for kind in (torch.bfloat16, torch.float32):  # autocast and a delta may give other types
            y, limit = rows.product(x.to(kind)), 1e-5 if kind == torch.float32 else 2**-7
            assert y.dtype == kind
            assert (y - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize(("name", "shape"), [("nf4", (48, 64)), ("nf4", (32, 32)), ("int8", (33, 64))])
def test_sizes_that_a_kernel_does_not_take_are_computed_with_the_weight_unpacked(name: str, shape: tuple) -> None:
    torch.manual_seed(0)
    layer = make(name, False, torch.randn(shape), torch.bfloat16)
    kind, x = KINDS[type(layer)], torch.randn(2, shape[1]).bfloat16()
    assert kind is Int8Linears or not kind.takes(layer)
    with torch.inference_mode():
        y = kind([layer]).product(x) if kind.takes(layer) else layer(x)
    assert torch.equal(y, F.linear(x, layer.dense()))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [None, LoRA(rank=2)])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_packed_model_answers_as_the_one_that_it_was(
    quantize: str | None, method: LoRA | None, tied: bool, native: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.1, tie_word_embeddings=tied, **sizes)
    storage = None if quantize is None else Storage(quantize, cache=False)
    model, packed = (
        build(folder, torch.bfloat16, method, storage=storage).eval().requires_grad_(False) for _ in range(2)
    )
    pack_weights(packed, native)
    kinds = {type(m) for m in packed.modules() if isinstance(m, Linear)}
    assert kinds == ({Packed, PackedTiedHead} if tied else {Packed})
    with torch.inference_mode():
        want, got = model(IDS), packed(IDS)
    assert (got - want).norm() < 2e-2 * want.norm()
    assert set(dict(packed.named_parameters())) == set(dict(model.named_parameters()))
    for (name, layer), (_, old) in zip(packed.named_modules(), model.named_modules(), strict=True):
        if isinstance(layer, Linear):
            off = (layer.dense() - old.dense()).norm() / old.dense().norm()
            assert off <= (2**-7 if quantize == "nf4" else 0), name
            x = torch.randn(3, layer.in_features).bfloat16()
            with torch.inference_mode():  # a layer that lies with others still answers by itself
                assert (layer(x) - old(x)).norm() < 2e-2 * old(x).norm()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_fused_block_computes_what_its_modules_do(
    changes: dict, dtype: torch.dtype, native: bool, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.25, **changes)
    model, fused = (build(folder, dtype).eval().requires_grad_(False) for _ in range(2))
    pack_weights(model, native)
    pack_weights(fused, native)
    fuse_blocks(fused)
    assert {type(block) for block in fused.blocks} == {FusedBlock}
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        assert (fused(IDS) - model(IDS)).norm() < limit * model(IDS).norm()
        packed = [Context.packed((12, 8), torch.device("cpu"), None) for _ in range(2)]
        plain, got = model(IDS[:1], packed[0]), fused(IDS[:1], packed[1])
        assert (got - plain).norm() < limit * plain.norm()
    caches = TokenCache(model), TokenCache(fused)
    for end in (5, 6, 9, 20):
        plain, got = (cache.logits(IDS[:, :end].tolist()) for cache in caches)
        assert (got - plain).norm() < limit * plain.norm()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("targets", [("*.attn.*", "*.mlp.*"), ("*.q", "*.v", "*.down")])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_fused_block_answers_with_lora_and_without(
    quantize: str | None, targets: tuple, native: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.1, **sizes)
    method, storage = LoRA(rank=2, targets=targets), None if quantize is None else Storage(quantize, cache=False)
    model, fused = (build(folder, torch.bfloat16, method, storage=storage).eval() for _ in range(2))
    torch.manual_seed(0)
    for delta in (m for m in model.modules() if isinstance(m, LowRank)):
        torch.nn.init.normal_(delta.B, std=0.05)
    fused.load_state_dict(model.state_dict())
    pack_weights(fused.requires_grad_(False), native)
    fuse_blocks(fused)
    assert {type(block) for block in fused.blocks} == {FusedBlock}
    with torch.inference_mode():
        want, got, few = model(IDS), fused(IDS), fused(IDS[:, :4])
        with without_delta(model), without_delta(fused):
            base, got_base = model(IDS), fused(IDS)
        again = fused(IDS)
    assert (want - base).norm() > 0.1 * base.norm()  # the delta does something
    assert (got - want).norm() < 2e-2 * want.norm()
    assert (few - want[:, :4]).norm() < 2e-2 * want[:, :4].norm()
    assert (got_base - base).norm() < 2e-2 * base.norm()
    assert torch.equal(again, got)


class Squashed(Delta):
    """Does not say what it comes to."""

    def forward(self, y: torch.Tensor, x: torch.Tensor, linear: Linear, ctx: Context | None) -> torch.Tensor:
        return 2 * y.tanh()


def test_a_block_that_is_not_of_llamas_kind_or_holds_another_delta_stays_as_it_is(tmp_path: Path) -> None:
    make_family(tmp_path / "neox", "neox")
    make_family(tmp_path / "gpt2", "gpt2")
    folder = make_folder(tmp_path / "llama")
    models = [build(tmp_path / name, torch.bfloat16) for name in ("neox", "gpt2")]
    models += [build(folder, torch.bfloat16, method) for method in (Adapter(layers=2), LoRA(rank=2), LoRA(rank=2))]
    for block, name in ((block, name) for block in models[-1].blocks for name in ("q", "o")):
        getattr(block.attn, name).slot.add("squashed", Squashed())
    kinds = [Block, Block, Block, FusedBlock, Block]
    for model, kind in zip(models, kinds, strict=True):
        pack_weights(model.requires_grad_(False))
        with torch.inference_mode():
            want = model(IDS)
            fuse_blocks(model)
            assert {type(block) for block in model.blocks} == {kind}
            assert kind is FusedBlock or torch.equal(model(IDS), want)
    model = build(folder, torch.bfloat16)
    fuse_blocks(model)  # not packed
    assert {type(block) for block in model.blocks} == {Block}


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 64)])
def test_the_norm_of_a_fused_block_is_the_root_mean_square_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = 5 + torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    want = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert torch.allclose(_norm(x, torch.cat((weight, weight)), 1e-5), want, rtol=1e-12, atol=1e-12)


def test_norms_that_trained_can_be_given_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", seed=7)
    model = build(folder, torch.bfloat16, LoRA(rank=2, unfreeze=("blocks.0.norm1.weight",)))
    state = {name: torch.ones_like(tensor) for name, tensor in delta_state(model).items()}
    load_delta(model, state, "here")
    pack_weights(model.eval().requires_grad_(False))
    fuse_blocks(model)
    assert [type(block) for block in model.blocks] == [Block, *[FusedBlock] * (len(model.blocks) - 1)]
    base = build(folder, torch.bfloat16).eval()
    with torch.inference_mode(), without_delta(model):
        assert (model(IDS) - base(IDS)).norm() < 2e-2 * base(IDS).norm()


def test_a_weight_that_a_delta_replaced_is_left_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=True)
    model = build(folder, torch.bfloat16, LoRA(unfreeze=("*.attn.q.weight", "embed.weight")))
    model.base_values = {"blocks.0.attn.q.weight": torch.zeros(1), "embed.weight": torch.zeros(1)}
    model.bfloat16()  # what trained is float32 otherwise, and not packed for that
    pack_weights(model)
    assert type(model.head) is TiedHead
    assert type(model.blocks[0].attn.q) is Linear  # without_delta must be able to put the base's own back
    assert type(model.blocks[0].attn.k) is Packed


def test_load_packs_what_only_answers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", seed=7)
    for precision in ("32-true", "bf16-true"):
        loaded = load_model(str(folder), precision=precision)
        assert all(isinstance(m, Packed | PackedTiedHead) for m in loaded.model.modules() if isinstance(m, Linear))
        assert {type(block) for block in loaded.model.blocks} == {FusedBlock}
    assert not any(isinstance(m, Packed) for m in load_model(str(folder), precision="16-true").model.modules())
    assert len(answer(loaded.model, [[5, 9], [7]], loaded.tokenizer, Sampling(max_new_tokens=8), ())[0].ids) == 8
