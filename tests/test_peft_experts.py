"""Adapters of peft on a mixture of experts, whose experts are one tensor in transformers."""

import pytest
import torch
from conftest import finetune
from families.tiny_families import make_family
from peft import PeftModel
from transformers import AutoModelForCausalLM

from litpeft.core.errors import ModelError
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))


def test_updates_of_attention_are_an_adapter_and_those_of_experts_are_not(tmp_path) -> None:
    make_family(tmp_path / "base", "mixtral")
    options = "--train.lr", "2e-2", "--train.epochs", "2", "--base.precision", "32-true"
    run = finetune(tmp_path / "base", tmp_path, *options, "--method.targets", '["*.attn.*"]')
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "final").eval()
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        assert (theirs(IDS).logits - want).abs().max() <= 5e-6 * want.abs().max()
    (run / "final" / "delta.json").rename(tmp_path / "delta.json")  # what is left is peft's alone
    with torch.no_grad():
        assert torch.allclose(load_model(str(run / "final"), precision="32-true").model(IDS), want, atol=1e-5)
    other = finetune(tmp_path / "base", tmp_path, *options, out="experts")
    assert not (other / "final" / "adapter_config.json").exists()
    with pytest.raises(ModelError, match="holds all experts of a layer in one tensor"):
        convert(Convert(str(other), to="peft"))
