"""Several deltas in one slot: applied in order, named, switched off, folded and answered with."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
from conftest import folded, make_folder
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.errors import UserError
from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import FusedBlock, fuse_blocks
from litpeft.generate.cpu.pack import pack_weights
from litpeft.generate.cpu.packed_weights import can_pack
from litpeft.methods.adapter import Adapter, PromptAttention
from litpeft.methods.adapter_v2 import ScaleBias
from litpeft.methods.lora import LowRank
from litpeft.model.affine import Affine
from litpeft.model.build import build
from litpeft.model.delta import Held, Method, linears, without_delta
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.quantize.cache import Cache
from litpeft.model.slots import Delta, Linear, LowRankDelta

IDS = torch.arange(40).view(2, 20)


@dataclass
class Both(Method):
    """A low-rank update of some layers, and in some of them a factor and a bias before it, after it, or both."""

    def attach(self, model: GPT) -> None:
        for number, linear in enumerate(linears(model, ("*.attn.*", "*.mlp.*")).values()):
            sizes = linear.in_features, linear.out_features
            if number % 5 < 2:
                linear.slot.add("before", ScaleBias(linear.out_features))
            if number % 3:
                linear.slot.add("lora", LowRank(*sizes, rank=2, scale=1.5, dropout=0.0))
            if number % 2:
                linear.slot.add("after", ScaleBias(linear.out_features))
            if number % 7 == 4:
                linear.slot.add("more", LowRank(*sizes, rank=4, scale=0.5, dropout=0.0))


def learnt(folder, dtype: torch.dtype = torch.float64, storage: Storage | None = None) -> GPT:
    torch.manual_seed(0)
    model = build(folder, dtype, Both(), storage=storage).eval()
    for delta in (m for m in model.modules() if isinstance(m, Delta)):
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def test_deltas_of_a_layer_act_in_the_order_in_which_they_were_added() -> None:
    torch.manual_seed(0)
    linear = Linear(6, 5).double()
    scale, lora = ScaleBias(5).double(), LowRank(6, 5, 2, 3.0, 0.0).double()
    for parameter in (*scale.parameters(), *lora.parameters()):
        nn.init.normal_(parameter)
    linear.slot.add("scale", scale)
    linear.slot.add("lora", lora)
    x = torch.randn(4, 6, dtype=torch.float64)
    factor, update = 1 + scale.scale, 3 * x @ lora.A.T @ lora.B.T
    want = factor * (x @ linear.weight.T + scale.bias) + update
    assert torch.allclose(linear(x), want, rtol=1e-12)
    y = linear.base(x)
    affine = linear.slot.frozen(linear)
    assert torch.allclose(affine.gain * y + x @ affine.A.T @ affine.B.T + affine.shift, want, rtol=1e-12)
    assert set(linear.state_dict()) == {
        "weight",
        *(f"slot.{name}" for name in ("scale.scale", "scale.bias", "lora.A", "lora.B")),
    }


@pytest.mark.parametrize("biases", [False, True])
def test_a_stack_folds(biases: bool, tmp_path) -> None:
    folder = make_folder(tmp_path / "model", attention_bias=True, mlp_bias=True, initializer_range=0.2)
    model, plain = learnt(folder), build(folder, torch.float64)
    with torch.no_grad():
        want = model(IDS)
        for name, tensor in folded(model).items():
            plain.get_parameter(name).data = tensor
        assert (plain(IDS) - want).abs().max() <= 1e-10 * want.abs().max()
        with without_delta(model):
            assert (model(IDS) - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no products in bfloat16")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_stack_is_answered_with_by_the_fused_block(quantize, dtype: torch.dtype, native: bool, tmp_path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "initializer_range": 0.1}
    folder = make_folder(tmp_path / "model", attention_bias=True, mlp_bias=True, **sizes)
    plain = learnt(folder, dtype, None if quantize is None else Storage(quantize, cache=False))
    other = copy.deepcopy(plain.requires_grad_(False))
    pack_weights(other, native)
    fuse_blocks(other)
    fused = dtype == torch.bfloat16 or quantize is None
    assert {type(block) for block in other.blocks} == ({FusedBlock} if fused else {type(plain.blocks[0])})
    limit, off = 5e-6 if dtype == torch.float32 else 3e-2, ((), ("lora",), ("before", "after"))
    with torch.inference_mode():
        pairs = [(other(IDS), plain(IDS))]
        pairs.append(tuple(TokenCache(model).logits(IDS.tolist()) for model in (other, plain)))
        for names in off:  # all, then some
            with without_delta(other, *names), without_delta(plain, *names):
                pairs.append((other(IDS), plain(IDS)))
                pairs.append(tuple(TokenCache(model).logits(IDS.tolist()) for model in (other, plain)))
        pairs.append((other(IDS), plain(IDS)))
    for got, want in pairs:
        assert (got - want).norm() < limit * want.norm()
    assert len({float(want.double().norm()) for _, want in pairs[::2]}) == 4


def test_each_delta_by_itself_is_the_stack_with_the_others_off(tiny_folder) -> None:
    model = learnt(tiny_folder)
    names = ("before", "lora", "after", "more")
    with torch.no_grad():
        for name in names:
            alone = copy.deepcopy(model)
            for linear in (m for m in alone.modules() if isinstance(m, Linear)):
                for other in set(linear.slot.deltas) - {name}:
                    delattr(linear.slot, other)
            with without_delta(model, *(other for other in names if other != name)):
                assert torch.equal(model(IDS), alone(IDS))
    assert all(name in linear.slot.deltas for name, linear in [("lora", model.blocks[0].attn.k)])


def test_two_deltas_that_want_the_same_place_are_refused_by_name() -> None:
    linear = Linear(4, 4)
    linear.slot.add("lora", LowRank(4, 4, 1, 1.0, 0.0))
    with pytest.raises(UserError, match="lora and lora want the same place"):
        linear.slot.add("lora", LowRank(4, 4, 1, 1.0, 0.0))
    linear.slot.add("first", Claiming())
    with pytest.raises(UserError, match="second and first want the same place: both the norm of each row"):
        linear.slot.add("second", Claiming())


class Claiming(Delta):
    claims = "the norm of each row"


def test_attention_is_replaced_by_one_delta_only(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, Adapter(layers=1))
    with pytest.raises(UserError, match="other and adapter want the same place"):
        model.blocks[-1].attn.core.add("other", PromptAttention(64, 4, 3))


def test_a_low_rank_delta_is_what_its_factors_say() -> None:
    with pytest.raises(TypeError, match="Louder must be a Delta"):

        class Louder(LowRankDelta):
            def forward(self, y: Tensor, *context: object) -> Tensor:
                return 2 * y


class Norms(Delta):
    """Keeps the norm of each row of what the layer holds."""

    def __init__(self, out_features: int):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(out_features))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.norm)

    def affine(self, linear: Linear) -> Affine:
        return Affine()


@dataclass
class Started(Method):
    """Knows the norms of the rows at the start, and halves the weight of o."""

    halves: bool = False

    def attach(self, model: GPT) -> None:
        for linear in linears(model, ("*.attn.*",)).values():
            linear.slot.add("norms", Norms(linear.out_features))

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        weight = weight / 2 if self.halves and name.endswith("attn.o") else weight
        if "norms" in linear.slot.deltas:
            copy_shard(linear.slot.deltas["norms"].norm, held(weight).double().norm(dim=1))
        return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_start_sees_what_each_layer_holds_and_may_change_it(quantize, dtype: torch.dtype, tmp_path) -> None:
    folder = make_folder(tmp_path / "model")
    storage = None if quantize is None else Storage(quantize)
    build(folder, dtype, Started(halves=True), storage=storage)
    assert storage is None or not Cache(folder, storage.key, "").folder.exists()  # these are not the base's codes
    base = build(folder, dtype, storage=storage)
    for method in (Started(), Started(halves=True)):
        model = build(folder, dtype, method, storage=storage)
        for name in "qkvo":
            linear, plain = (getattr(m.blocks[1].attn, name) for m in (model, base))
            assert torch.allclose(linear.slot.norms.norm, linear.dense().double().norm(dim=1).float())
            factor = 0.5 if method.halves and name == "o" else 1
            assert torch.allclose(linear.dense(), factor * plain.dense(), rtol=2e-2)
    assert torch.equal(build(folder, dtype, storage=storage).blocks[1].attn.o.dense(), base.blocks[1].attn.o.dense())
