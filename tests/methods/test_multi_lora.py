"""MultiLoRA against its formula, computed by torch's own layers: values and gradients; LoRA is a special case."""

import pytest
import torch
from conftest import TINY
from torch.nn.functional import linear

from litpeft.methods.lora import LoRA
from litpeft.methods.multi_lora import LowRanks, MultiLoRA
from litpeft.model.build import build
from litpeft.model.delta import trainable

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def test_values_and_gradients_are_those_of_the_formula(tiny_folder) -> None:
    layer = build(tiny_folder, torch.float64, MultiLoRA(rank=4, number=3, alpha=6)).blocks[0].mlp.down
    delta = layer.slot.deltas["multi_lora"]
    torch.manual_seed(0)
    torch.nn.init.normal_(delta.c)
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    parts = [tensor.detach().clone().requires_grad_() for tensor in (delta.A, delta.B, delta.c)]
    want = linear(x, layer.weight)
    for j in range(3):
        a, b, c = parts[0][4 * j : 4 * j + 4], parts[1][:, 4 * j : 4 * j + 4], parts[2][j]
        want = want + 6 / 4 * c * linear(linear(x, a), b)
    got = layer(x, None)
    assert (want - got).abs().max() <= 1e-12 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    for out in (want, got):
        (out * weight).sum().backward()
    for own, other in zip((delta.A, delta.B, delta.c), parts, strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_one_update_that_is_not_scaled_is_lora(tiny_folder) -> None:
    ours = build(tiny_folder, torch.float64, MultiLoRA(rank=4, number=1))
    lora = build(tiny_folder, torch.float64, LoRA(rank=4))
    for name, delta in ours.named_modules():
        if isinstance(delta, LowRanks):
            other = lora.get_submodule(name.replace("multi_lora", "lora"))
            torch.nn.init.ones_(delta.c)
            other.A.data.copy_(delta.A)
            other.B.data.copy_(delta.B)
    assert torch.equal(ours(IDS), lora(IDS))


def test_only_the_scales_have_a_gradient_at_the_start(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, MultiLoRA())
    model(IDS).square().sum().backward()
    assert all(parameter.grad.any() == (name[-1] == "c") for name, parameter in trainable(model).items())


def test_the_updates_together_have_the_rank_of_all(tiny_folder) -> None:
    layer = build(tiny_folder, torch.float64, MultiLoRA(rank=4, number=3)).blocks[1].attn.o
    delta = layer.slot.deltas["multi_lora"]
    torch.nn.init.normal_(delta.c, generator=torch.Generator().manual_seed(0))
    a, b = delta.factors()
    assert torch.linalg.matrix_rank(b @ a) == 12
    assert float(delta.B.detach().abs().max()) == pytest.approx(4**-0.5, rel=0.02)  # Kaiming's bound for rank inputs


@pytest.mark.parametrize("settings", [{"rank": 0}, {"number": 0}, {"number": 65}, {"dropout": 1.0}, {"alpha": 0.0}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        MultiLoRA(**settings)
