"""Weights in the layout of a CPU's matrix library are the same numbers, and answer the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_folder

from litpeft.build import build, load
from litpeft.generate import answer
from litpeft.methods.lora import LoRA
from litpeft.settings.generate import Sampling
from litpeft.slots import Linear, TiedHead
from litpeft.storage.packed import Packed, PackedTiedHead, can_pack, pack

IDS = torch.arange(40).view(2, 20)
pytestmark = pytest.mark.skipif(not can_pack(), reason="this processor has no products in bfloat16")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (33, 7), (1, 1), (576, 192)])
def test_a_packed_layer_has_the_weight_and_the_products_of_a_dense_one(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": Linear(shape[1], shape[0], bias).bfloat16().requires_grad_(False)})
    if bias:
        model["layer"].bias.data = model["layer"].bias.float()  # as one that has been trained
    model.base_values = {}
    layer, weight = model["layer"], model["layer"].weight.clone()
    inputs = [torch.randn(*rows, shape[1]).bfloat16() for rows in ((1, 1), (1, 5), (3, 300))]
    pack(model)
    assert type(layer) is Packed
    assert torch.equal(layer.dense(), weight)
    for x in inputs:
        want = F.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
        assert layer(x).dtype == torch.bfloat16
        for y in (layer(x), layer(x.float())):  # autocast and a delta may give other types
            assert (y - want).abs().max() <= 2**-8 * want.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [None, LoRA(rank=2)])
def test_a_packed_model_answers_as_the_one_that_it_was(tied: bool, method: LoRA | None, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.25, tie_word_embeddings=tied)
    model, packed = (build(folder, torch.bfloat16, method).eval().requires_grad_(False) for _ in range(2))
    pack(packed)
    kinds = {type(m) for m in packed.modules() if isinstance(m, Linear)}
    assert kinds == ({Packed, PackedTiedHead} if tied else {Packed})
    with torch.inference_mode():
        want, got = model(IDS), packed(IDS)
    assert (got - want).norm() < 2e-2 * want.norm()
    assert {name: p.shape for name, p in packed.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_weight_that_a_delta_replaced_is_left_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=True)
    model = build(folder, torch.bfloat16, LoRA(unfreeze=("*.attn.q.weight", "embed.weight")))
    model.base_values = {"blocks.0.attn.q.weight": torch.zeros(1), "embed.weight": torch.zeros(1)}
    model.bfloat16()  # what trained is float32 otherwise, and not packed for that
    pack(model)
    assert type(model.head) is TiedHead
    assert type(model.blocks[0].attn.q) is Linear  # without_delta must be able to put the base's own back
    assert type(model.blocks[0].attn.k) is Packed


def test_load_packs_what_only_answers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", seed=7)
    loaded = load(str(folder), precision="bf16-true")
    assert all(isinstance(m, Packed | PackedTiedHead) for m in loaded.model.modules() if isinstance(m, Linear))
    assert not any(isinstance(m, Packed) for m in load(str(folder), precision="32-true").model.modules())
    assert len(answer(loaded.model, [[5, 9], [7]], loaded.tokenizer, Sampling(max_new_tokens=8), ())[0].ids) == 8
