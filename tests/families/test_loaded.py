"""Every family by the path that answers take: in float64, in bfloat16, and with a base of few bits."""

from pathlib import Path

import pytest
import torch
from conftest import in_float64
from tiny_families import MODELS, make_family

from litpeft.generate.load import load_model
from litpeft.model.build import build
from litpeft.model.quantize import Storage
from litpeft.model.quantize.quantized import Quantized

IDS = torch.randint(2, 257, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("loaded")
    return folder, make_family(folder, request.param, torch.float64)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1))


@torch.no_grad()
def test_logits_in_float64_are_those_of_transformers(made) -> None:
    folder, theirs = made
    assert error(load_model(str(folder), precision="64-true").model(IDS), in_float64(theirs)(IDS).logits) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_logits_of_a_quantised_base_are_those_of_its_unpacked_weights(made, name: str) -> None:
    folder, _ = made
    plain, packed = build(folder, torch.float32), build(folder, torch.float32, storage=Storage(name))
    layers = {key: layer for key, layer in packed.named_modules() if isinstance(layer, Quantized)}
    assert len(layers) >= 2 * 4
    before = plain(IDS)
    for key, layer in layers.items():
        plain.get_submodule(key).weight.data = layer.dense()
    loaded = load_model(str(folder), precision="32-true", quantize=name).model
    assert error(loaded(IDS), plain(IDS)) <= 2e-5
    assert error(before, plain(IDS)) > 1e-4


@torch.no_grad()
def test_logits_in_bfloat16_are_those_of_the_plain_path(made) -> None:
    folder, _ = made
    got, want = load_model(str(folder), precision="bf16-true").model(IDS), build(folder, torch.bfloat16)(IDS)
    assert got.dtype == torch.bfloat16
    assert error(got, want) <= 3e-2
