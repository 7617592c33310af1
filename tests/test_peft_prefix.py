"""Prefix tuning of peft in every family: the logits of peft, or a refusal where keys go through more than positions."""

from pathlib import Path

import pytest
import torch
from families.tiny_families import LINEAR, MODELS, make_family
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.exports import CannotExport
from litpeft.exchange.exports.peft import adapter_of
from litpeft.exchange.run import build_run, find_run
from litpeft.methods.prefix import Prefix
from litpeft.model.build import build
from litpeft.model.delta import attach, delta_state

REFUSED = (
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "gemma4_text",
    "gemma3_text",
    "olmo3",
    "olmo2",
    "olmo",
    "ministral3",
    "hunyuan_v1_dense",
    "exaone4",
    "glm4_moe",
    "apertus",
)
REFUSED += ("cohere",)  # with use_qk_norm
NOT_IN_PEFT = ("neox", "neox serial", "falcon", "falcon new", "deepseek_v2", "deepseek_v3")  # it makes other shapes
IDS = torch.randint(2, 100, (2, 20), generator=torch.Generator().manual_seed(0))
COUNT = 3
NO_ATTENTION = (*LINEAR, "lfm2", "lfm2_moe", "granitemoehybrid", "nemotron_h", "falcon_h1", "bamba")  # in some layers


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_IN_PEFT])
def test_the_prefix_of_peft_is_read_and_written_where_it_means_the_same(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_family(base, name)
    if name in NO_ATTENTION:
        with pytest.raises(ConfigError, match="some layers of this model have no attention"):
            attach(build(base, torch.float32), Prefix(prompt_length=COUNT))
    if name in REFUSED:
        torch.manual_seed(0)
        attach(model := build(base, torch.float32), method := Prefix(prompt_length=COUNT))
        with pytest.raises(CannotExport, match="of this model, and those of peft come after it|in some blocks only"):
            adapter_of(method, None, delta_state(model), base)
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    run = find_run(tmp_path / "adapter")
    if name in REFUSED or name in NO_ATTENTION:
        with pytest.raises(ModelError, match="is not read for this base: (keys and values go through|some of its lay)"):
            run.base_folder()
        return
    model = build_run(run, run.base_folder(), torch.float32)
    got = model(torch.cat((torch.zeros(2, COUNT, dtype=torch.long), IDS), 1))[:, COUNT:]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    want = again.eval()(IDS).logits[:, -IDS.size(1) :]
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    assert adapter_of(run.method(), None, run.delta(), base).config["peft_type"] == "PREFIX_TUNING"
