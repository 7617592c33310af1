"""Tied-LoRA against its formula: values and gradients, what is shared, and where it starts."""

import pytest
import torch
from conftest import TINY, finetune
from safetensors.torch import load_file
from torch.nn.functional import linear

from litpeft.core.errors import ConfigError
from litpeft.methods.tied_lora import TiedLoRA
from litpeft.model.build import build
from litpeft.model.delta import trainable

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def random_run(folder, **settings):
    model = build(folder, torch.float64, TiedLoRA(rank=4, alpha=6, **settings))
    torch.manual_seed(0)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter)
    return model


def test_values_and_gradients_are_those_of_the_formula_summed_over_the_blocks(tiny_folder) -> None:
    model = random_run(tiny_folder, targets=("*.attn.q", "*.attn.k", "*.attn.v", "*.mlp.down"))
    pair = model.banks["tied_lora_qkv"]
    a, b = (tensor.detach().clone().requires_grad_() for tensor in (pair.A, pair.B))
    assert a.shape == (4, 64)
    assert b.shape == (64 + 32 + 32, 4)
    x = torch.randn(5, 64, dtype=torch.float64)
    for number, block in enumerate(model.blocks):
        inner, at = model.banks[f"tied_lora_{number}_qkv"], 0
        u = inner.u.detach().clone().requires_grad_()
        for layer in (block.attn.q, block.attn.k, block.attn.v):
            v = layer.slot.deltas["tied_lora"].v.detach().clone().requires_grad_()
            rows = b[at : at + len(v)]
            want = linear(x, layer.weight) + 6 / 4 * v * linear(u * linear(x, a), rows)
            got = layer(x, None)
            assert (want - got).abs().max() <= 1e-12 * want.abs().max()
            for out in (want, got):
                out.square().sum().backward()
            assert torch.allclose(layer.slot.deltas["tied_lora"].v.grad, v.grad, rtol=1e-10, atol=1e-12)
            at += len(v)
        assert torch.allclose(inner.u.grad, u.grad, rtol=1e-10, atol=1e-12)
    assert torch.allclose(pair.A.grad, a.grad, rtol=1e-10, atol=1e-12)
    assert torch.allclose(pair.B.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_a_run_saves_the_pair_once(tiny_folder, tmp_path) -> None:
    saved = load_file(finetune(tiny_folder, tmp_path, method="tied_lora") / "final" / "delta.safetensors")
    names = ["banks.tied_lora_qkv.A", "banks.tied_lora_qkv.B"]
    names += [f"banks.tied_lora_{block}_qkv.u" for block in (0, 1)]
    names += [f"blocks.{block}.attn.{kind}.slot.tied_lora.v" for block in (0, 1) for kind in "qkv"]
    assert set(saved) == set(names)


@pytest.mark.parametrize(("train", "moves"), [("ABuv", "v"), ("Auv", "v"), ("ABu", "B"), ("B", "B"), ("uv", "v")])
def test_what_starts_at_zero_alone_has_a_gradient_there(tiny_folder, train: str, moves: str) -> None:
    model = build(tiny_folder, torch.float32, TiedLoRA(train=train))
    plain = build(tiny_folder, torch.float32)
    assert torch.equal(model(IDS), plain(IDS))
    model(IDS).square().sum().backward()
    parameters = trainable(model)
    assert {name[-1] for name in parameters} == set(train)
    assert all(parameter.grad.any() == (name[-1] == moves) for name, parameter in parameters.items())


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"train": "Au"}, {"train": "ABx"}, {"train": ""}, {"dropout": 1.0}, {"alpha": 0.0}]
)
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        TiedLoRA(**settings)


@pytest.mark.parametrize(
    ("targets", "why"), [(("head",), "in no block"), (("blocks.0.attn.q", "*.attn.k"), "the same")]
)
def test_targets_that_cannot_be_tied_are_refused(tiny_folder, targets: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build(tiny_folder, torch.float32, TiedLoRA(targets=targets))
