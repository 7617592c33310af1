"""Selective finetuning against transformers: the same parameters get the same gradients, and no others."""

import pytest
import torch
from conftest import TINY, finetune, in_float64
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.core.errors import ConfigError
from litpeft.methods.selective import Selective
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.quantize import Storage

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def in_last_block(name: str) -> bool:
    return name.startswith("model.layers.1.")


def is_norm(name: str) -> bool:
    return "norm" in name


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, is_norm),
        ({"norms": False, "last_blocks": 1}, in_last_block),
        ({"last_blocks": 1}, lambda name: is_norm(name) or in_last_block(name)),
        ({"norms": False, "unfreeze": ("embed*",)}, lambda name: "embed" in name),
    ],
)
def test_the_chosen_parameters_get_the_gradients_of_transformers_and_no_others(tiny_folder, settings, chosen) -> None:
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    ours, names = build(tiny_folder, torch.float64, Selective(**settings)), NameMap(*read_config(tiny_folder))
    for logits in (theirs(IDS).logits, ours(IDS)):
        logits.square().mean().backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if chosen(name)}
    got = {names.file_name(name): p.grad for name, p in trainable(ours).items()}
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], rtol=1e-8, atol=1e-12) for name in want)


def test_a_run_saves_what_trained_under_its_own_name(tiny_folder, tmp_path) -> None:
    saved = load_file(finetune(tiny_folder, tmp_path, method="selective") / "final" / "delta.safetensors")
    norms = [f"blocks.{block}.norm{number}.weight" for block in (0, 1) for number in (1, 2)]
    assert set(saved) == {*norms, "norm.weight"}


def test_norms_train_on_a_quantised_base_and_blocks_in_codes_are_refused(tiny_folder) -> None:
    assert len(trainable(build(tiny_folder, torch.float32, Selective(), storage=Storage("nf4")))) == 5
    with pytest.raises(ConfigError, match="blocks.1.attn.q.weight, which base.quantize holds in codes") as error:
        build(tiny_folder, torch.float32, Selective(last_blocks=1), storage=Storage("nf4"))
    assert error.value.where == "method.last_blocks"


@pytest.mark.parametrize("number", [-1, 3])
def test_more_blocks_than_there_are_are_refused(tiny_folder, number: int) -> None:
    with pytest.raises(ConfigError, match="at least 0 and at most 2, the blocks of this model, got"):
        build(tiny_folder, torch.float32, Selective(last_blocks=number))
