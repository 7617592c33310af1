"""Answers on a CPU go through packed weights and fused blocks: the plain ones, for whatever model and method."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ON_CODES_ONLY, make_folder, method_of, storage_of
from model_switches import AWAY, CONFIG

from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import FusedBlock, fuse_blocks
from litpeft.generate.cpu.pack import pack_weights
from litpeft.methods import METHODS
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.delta import trainable
from litpeft.model.gpt import GPT, MLP
from litpeft.model.multi_head import Attention
from litpeft.model.norms import RMSNorm
from litpeft.model.slots import Delta, Linear, Slot

LIMITS = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 3e-2}  # relative


def made(config: ModelConfig, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, std=0.3)
    model.dtype = dtype
    return model.to(dtype).eval().requires_grad_(False)


def fast(model: GPT) -> GPT:
    """Returns a copy as `load` makes it ready to answer."""
    model = copy.deepcopy(model)
    pack_weights(model)
    fuse_blocks(model)
    return model


def assert_answers_alike(plain: GPT, other: GPT, limit: float, truth: GPT | None = None) -> None:
    """Compares logits without a cache, and with one: of rows in a batch, step by step, and of guessed tokens.

    They may differ by as much as those of `plain` do from the `truth`, if it is given.
    """
    torch.manual_seed(1)
    rows = [torch.randint(2, 300, (n,)).tolist() for n in (5, 17, 1)]
    models = plain, other, truth or plain
    caches = [TokenCache(model) for model in models]
    with torch.inference_mode():
        texts = torch.tensor([rows[1]]), torch.tensor([rows[1], rows[1][::-1]])
        found = [[model(ids).double() for model in models] for ids in texts]
        for step in range(3):
            last = 1 if step == 0 else 2
            found.append([cache.logits(rows, last).double() for cache in caches])
            rows = [[*row, 3 + number, 9, 4] for number, row in enumerate(rows)]
    for want, got, true in found:
        assert (got - want).norm() <= max(limit * want.norm(), (want - true).norm())


def test_every_switch_is_tried_with_a_value_that_has_an_effect() -> None:
    ids, idle = torch.arange(17)[None], []
    want = made(CONFIG, torch.float64)(ids)
    for name, value in AWAY.items():
        idle += [name] if torch.equal(made(replace(CONFIG, **{name: value}), torch.float64)(ids), want) else []
    assert idle == []


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", [None, *AWAY])
def test_each_switch_of_the_model_is_heeded(name: str | None, dtype: torch.dtype) -> None:
    plain = made(CONFIG if name is None else replace(CONFIG, **{name: AWAY[name]}), dtype)
    other = fast(plain)
    if name is None and dtype == torch.float32:
        assert {type(block) for block in other.blocks} == {FusedBlock}
    assert_answers_alike(plain, other, LIMITS[dtype])


class HeadNormed(Attention):
    """What a family would write that norms its queries and keys."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim) for _ in range(2))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        x = super().heads(x)
        return self.q_norm(x) if x.size(1) == 3 else self.k_norm(x)


class OneMore(RMSNorm):
    """A norm whose weight is 1 + its parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


class Experts(nn.Module):
    """A mixture of two MLPs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.experts = nn.ModuleList(MLP(config) for _ in range(2))

    def forward(self, x: torch.Tensor, ctx: object) -> torch.Tensor:
        return sum(expert(x, ctx) for expert in self.experts)


class PostNormed(nn.Module):
    """An MLP whose output is normed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inner, self.norm = MLP(config), nn.RMSNorm(config.d_model)

    def forward(self, x: torch.Tensor, ctx: object) -> torch.Tensor:
        return self.norm(self.inner(x, ctx))


class Squashed(Delta):
    """What a method might do with what a slot is given."""

    def forward(self, y: torch.Tensor, *context: object) -> torch.Tensor:
        return y.tanh()


CHANGES = {
    "norms of queries and keys": lambda block: setattr(block, "attn", HeadNormed(CONFIG, 0)),
    "another norm": lambda block: setattr(block, "norm2", OneMore(CONFIG.d_model, CONFIG.norm_eps)),
    "experts": lambda block: setattr(block, "mlp", Experts(CONFIG)),
    "a norm after the MLP": lambda block: setattr(block, "mlp", PostNormed(CONFIG)),
    "a module in place of a slot": lambda block: setattr(block, "after_attn", Squashed()),
}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_block_of_another_kind_is_not_fused(name: str, dtype: torch.dtype) -> None:
    plain = made(CONFIG, dtype)
    CHANGES[name](plain.blocks[0])
    torch.manual_seed(2)
    for parameter in plain.blocks[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = plain.to(dtype).requires_grad_(False)
    other = fast(plain)
    assert FusedBlock not in {type(block) for block in other.blocks}
    assert_answers_alike(plain, other, LIMITS[dtype])


SLOTS = [name for name, module in GPT(CONFIG).named_modules() if isinstance(module, Slot)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLOTS)
def test_what_is_in_each_slot_is_heeded(name: str, dtype: torch.dtype) -> None:
    plain = made(CONFIG, dtype)
    empty = plain(torch.arange(9)[None])
    plain.get_submodule(name).add("squashed", Squashed())
    assert not torch.equal(plain(torch.arange(9)[None]), empty)
    assert_answers_alike(plain, fast(plain), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_heeded(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = make_folder(tmp_path / "model")
    storage = storage_of(name) if name in ON_CODES_ONLY else None

    def changed(dtype: torch.dtype) -> GPT:
        torch.manual_seed(3)
        model = build(folder, dtype, method_of(name), storage=storage)
        for parameter in trainable(model).values():
            parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter)
        return model.eval().requires_grad_(False)

    plain = changed(dtype)  # rounds what it unpacks to bfloat16, and products with codes do not
    truth = changed(torch.float64) if storage is not None and dtype == torch.bfloat16 else None
    assert_answers_alike(plain, fast(plain), LIMITS[dtype], truth)


def test_what_is_packed_is_every_linear_layer_of_a_block() -> None:
    plain = made(CONFIG, torch.float32)
    plain.blocks[0].mlp = Experts(CONFIG).requires_grad_(False)
    other = fast(plain)
    layers = [layer for layer in other.blocks[0].modules() if isinstance(layer, Linear)]
    assert len(layers) == 10
    assert all(layer.packed_in is not None for layer in layers)
