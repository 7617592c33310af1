"""VeRA against peft: the same matrices and vectors give the same logits and the same gradients."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, finetune, in_float64
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.methods.vera import Scaled, VeRA
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def test_logits_and_gradients_equal_peft(tiny_folder) -> None:
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    config = VeraConfig(r=6, target_modules=ALL, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).double().eval()
    ours = build(tiny_folder, torch.float64, VeRA(rank=6)).eval()
    names, bank, pairs = NameMap(*read_config(tiny_folder)), ours.banks["vera"], []
    torch.manual_seed(4)
    for name, delta in ours.named_modules():
        if isinstance(delta, Scaled):
            linear = names.file_name(f"{name.removesuffix('.slot.vera')}.weight").removesuffix(".weight")
            layer = theirs.get_submodule(f"base_model.model.{linear}")
            assert layer.vera_A["default"].shape == bank.A.shape
            assert layer.vera_B["default"].shape == bank.B.shape
            layer.vera_A["default"], layer.vera_B["default"] = bank.A, bank.B
            for own, other in ((delta.d, layer.vera_lambda_d["default"]), (delta.b, layer.vera_lambda_b["default"])):
                torch.nn.init.normal_(own)
                other.data.copy_(own.data)
                pairs.append((own, other))
    assert len(pairs) == 2 * 14
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    for logits in (want, got):
        (logits * weight).sum().backward()
    assert all(torch.allclose(own.grad, other.grad, rtol=1e-8, atol=1e-10) for own, other in pairs)


def test_the_matrices_follow_from_the_seed_alone(tiny_folder) -> None:
    first, again, other = (
        build(tiny_folder, torch.float32, VeRA(rank=64, seed=seed)).banks["vera"] for seed in (0, 0, 1)
    )
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    assert not torch.equal(first.A, other.A)
    assert first.A.shape == (64, 112)
    assert first.B.shape == (112, 64)
    for matrix in (first.A, first.B):  # Kaiming's uniform start: a deviation of sqrt(2 / inputs)
        assert abs(float(matrix.std()) / (2 / matrix.size(1)) ** 0.5 - 1) < 0.03
        assert abs(float(matrix.mean())) < 0.01
    raw = np.random.PCG64(0).random_raw(2)
    bound = (6 / 112) ** 0.5
    want = [bound * (2 * (int(bits) >> 40) / 2**24 - 1) for bits in raw]
    assert first.A[0, :2].tolist() == pytest.approx(want, rel=1e-6)


def test_a_run_saves_vectors_and_a_seed(tiny_folder, tmp_path) -> None:
    run = finetune(tiny_folder, tmp_path, "--method.seed", "7", "--method.rank", "16", method="vera")
    saved = load_file(run / "final" / "delta.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"d", "b"}
    assert json.loads((run / "final" / "delta.json").read_text())["settings"]["seed"] == 7


def test_only_the_inner_vector_has_no_gradient_at_the_start(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, VeRA(rank=8))
    model(IDS).square().sum().backward()
    assert all(parameter.grad.any() == (name[-1] == "b") for name, parameter in trainable(model).items())


@pytest.mark.parametrize("settings", [{"rank": 0}, {"d_initial": 0.0}, {"dropout": 1.0}, {"seed": -1}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        VeRA(**settings)
