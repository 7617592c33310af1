"""LoRA-GA against the gradients of transformers' model, and against peft's start from them."""

import pytest
import torch
from conftest import TINY, calibrated, finetune, in_float64, random_rows
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.exchange.run import build_run, find_run
from litpeft.methods.lora_ga import LoRAGA
from litpeft.methods.pissa import Split
from litpeft.model.build import build
from litpeft.model.delta import without_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def splits(model) -> dict[str, Split]:
    return {name.removesuffix(".slot.lora_ga"): m for name, m in model.named_modules() if isinstance(m, Split)}


def train_step(model) -> None:
    for row in random_rows(4):
        logits = model(torch.tensor([row.ids])).logits[0]
        torch.nn.functional.cross_entropy(logits[9:-1], torch.tensor(row.ids[10:]), reduction="sum").backward()


def test_the_start_is_pefts_up_to_signs_with_both_factors_scaled_as_by_the_authors(tiny_folder) -> None:
    """peft scales B alone, and by the singular values, too: the authors scale both, and drop those."""
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "lora_ga"}
    config = LoraConfig(**settings, lora_ga_config=LoraGAConfig(scale="unit"), task_type="CAUSAL_LM")
    preprocess_loraga(theirs, config, lambda: train_step(theirs))
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False)
    method = calibrated(LoRAGA(rank=4, alpha=6.0), tiny_folder, 4)
    ours, names = build(tiny_folder, torch.float64, method), NameMap(*read_config(tiny_folder))
    found = splits(ours)
    assert len(found) == 14
    for name, delta in found.items():
        linear = names.file_name(f"{name}.weight").removesuffix(".weight")
        layer = theirs.get_submodule(f"base_model.model.{linear}")
        a, b = (getattr(layer, f"lora_{key}")["default"].weight for key in "AB")
        c = len(delta.B) ** 0.25 / 16**0.5
        assert torch.allclose((delta.A @ a.T).abs() / c, torch.eye(4, dtype=torch.float64), atol=1e-2), name
        b = b / b.norm(dim=0)
        assert torch.allclose((delta.B.T @ b).abs() / c, torch.eye(4, dtype=torch.float64), atol=1e-2), name


def test_the_gradients_are_those_of_the_rows_and_the_start_their_singular_vectors(tiny_folder) -> None:
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    train_step(theirs)
    names = NameMap(*read_config(tiny_folder))
    ours = build(tiny_folder, torch.float64, calibrated(LoRAGA(rank=4, gamma=9.0), tiny_folder, 4))
    base = build(tiny_folder, torch.float64)
    for name, delta in splits(ours).items():
        gradient = theirs.get_parameter(names.file_name(f"{name}.weight")).grad
        u, _, v = torch.linalg.svd(gradient)
        c = len(u) ** 0.25 / 9**0.5
        want_a, want_b = c * v[:4], c * u[:, 4:8]
        assert torch.allclose(delta.A.T @ delta.A, want_a.T @ want_a, atol=1e-4)
        assert torch.allclose(delta.B @ delta.B.T, want_b @ want_b.T, atol=1e-4)
        held = ours.get_submodule(name).weight + delta.scale * delta.B @ delta.A
        assert (held - base.get_submodule(name).weight).abs().max() <= 1e-6
    assert (ours(IDS) - base(IDS)).abs().max() <= 1e-12
    with without_delta(ours):
        assert (ours(IDS) - base(IDS)).abs().max() <= 1e-12


def test_a_run_makes_the_weight_again_that_it_was_trained_with(tiny_folder, tmp_path) -> None:
    run = find_run(finetune(tiny_folder, tmp_path, method="lora_ga"))
    saved = load_file(run.folder / "delta.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"A", "B", "A0", "B0"}
    base, model = build(tiny_folder, torch.float32), build_run(run, tiny_folder, torch.float32)
    for name, delta in splits(model).items():
        taken = delta.scale * saved[f"{name}.slot.lora_ga.B0"] @ saved[f"{name}.slot.lora_ga.A0"]
        assert taken.any()
        assert (model.get_submodule(name).weight + taken - base.get_submodule(name).weight).abs().max() <= 1e-6


def test_a_rank_is_at_most_half_of_what_a_weight_has(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, calibrated(LoRAGA(rank=64), tiny_folder))
    assert model.blocks[0].attn.k.slot.lora_ga.A.shape == (16, 64)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"gamma": 0.0}, {"calibration_rows": 0}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        LoRAGA(**settings)
