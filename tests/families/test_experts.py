"""Mixtures of experts: methods and storages act on each expert's layers, and what is merged loads in transformers."""

import pytest
import torch
from conftest import folded
from tiny_families import make_family

from litpeft.core.errors import ConfigError
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families import mixtral
from litpeft.model.mixture import Router
from litpeft.model.quantize import Storage
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.slots import Linear

IDS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_lora_acts_on_each_expert_and_folds_into_it(tmp_path) -> None:
    make_family(tmp_path, "mixtral")
    model = build(tmp_path, torch.float64, LoRA(rank=3, targets=("*.experts.*",))).eval()
    slots = [key for key in trainable(model) if key.endswith("slot.lora.B")]
    assert len(slots) == 2 * 5 * 3  # layers, experts, linear layers
    base = model(IDS)
    for key in slots:
        torch.nn.init.normal_(model.get_parameter(key), std=0.1)
    want = model(IDS)
    plain = build(tmp_path, torch.float64)
    plain.load_state_dict(folded(model))
    assert (plain(IDS) - want).abs().max() <= 1e-10
    assert (base - want).abs().max() > 1e-2


def test_an_expert_without_a_token_has_a_gradient_of_zero(tmp_path) -> None:
    make_family(tmp_path, "mixtral")
    model = build(tmp_path, torch.float64, LoRA(rank=2, targets=("*.experts.*",), unfreeze=("*.router.*",)))
    model(IDS[:1, :1]).square().sum().backward()
    grads = {key: parameter.grad for key, parameter in trainable(model).items()}
    assert all(grad is not None for grad in grads.values())
    of_b = [float(grad.abs().sum()) for key, grad in grads.items() if key.endswith("down.slot.lora.B")]
    assert sum(size > 0 for size in of_b) == 2 * 2  # of five experts in each of two layers a token takes two
    assert grads["blocks.0.mlp.router.weight"].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_experts_are_quantised_one_by_one_and_the_router_is_not(name: str, tmp_path) -> None:
    make_family(tmp_path, "mixtral")
    model = build(tmp_path, torch.float32, storage=Storage(name))
    layers = {key: module for key, module in model.blocks.named_modules() if isinstance(module, Linear)}
    assert len(layers) == 2 * (4 + 15)
    assert all(isinstance(layer, Quantized) for layer in layers.values())
    assert type(model.blocks[0].mlp.router) is Router
    plain = build(tmp_path, torch.float32)
    for key, layer in layers.items():
        plain.blocks.get_submodule(key).weight.data = layer.dense()
    assert (model(IDS) - plain(IDS)).abs().max() <= 2e-5


def test_targets_that_a_mixture_lacks_are_named_once_for_all_experts(tmp_path) -> None:
    make_family(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match=r'"\*\.mlp\.up" matches no linear layer; .*\*\.experts\.\*\.up, ') as error:
        build(tmp_path, torch.float32, LoRA(targets=("*.mlp.up",)))
    assert "experts.1" not in str(error.value)


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok 9 is more than the 8 experts"):
        mixtral.config({"num_experts_per_tok": 9})
