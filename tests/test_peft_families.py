"""LoRA of every family in peft's hands, and peft's in litpeft's: slow, for scripts/verify_formats.sh."""

import pytest
import test_peft_in
import test_peft_out
from families.tiny_families import LINEAR, MODELS, limit, make_family
from peft import LoraConfig

from litpeft.core.exports import CannotExport
from litpeft.exchange.exports.peft import adapter_of, write_adapter

MAMBA = {"granitemoehybrid", "nemotron_h", "falcon_h1"}
NO_OUT = {"nemotron_h", "falcon_h1"}  # in which peft refuses LoRA on out_proj
LATENT = {"deepseek_v2", "deepseek_v3"}
MIXTURES = {
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "lfm2_moe",
    "nemotron_h",
    "glm4_moe",
    "ernie4_5_moe",
    *LATENT,
    *LINEAR[1:],
}  # their experts are one tensor in transformers


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_with_the_updates_of_a_family_what_the_run_computes(family: str, tmp_path) -> None:
    make_family(tmp_path / "base", family)
    settings = {"rank": 3, "alpha": 5.0} | ({"targets": ("*.attn.*",)} if family in MIXTURES else {})
    if family in NO_OUT:
        model, method, delta = test_peft_out.learnt(tmp_path / "base", "lora", {"targets": ("*.attn.*",)})
        with pytest.raises(
            CannotExport, match=r"peft takes no LoRA of model.layers.0.*.out_proj in .* not name .*out is"
        ):
            adapter_of(method, None, delta, tmp_path / "base")
        settings["targets"] = ("*.in_z", "*.in_x", "*.in_b", "*.in_c", "*.in_dt", "*.attn.[qkvo]")
    model, method, delta = test_peft_out.learnt(tmp_path / "base", "lora", settings)
    (tmp_path / "peft").mkdir()
    write_adapter(tmp_path / "peft", method, None, delta, tmp_path / "base")
    test_peft_out.compare(model, tmp_path / "base", tmp_path / "peft", limit(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_of_peft_on_a_family_computes_here_what_it_computes_there(family: str, tmp_path) -> None:
    make_family(tmp_path / "base", family)
    heads = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"] if family in LATENT else ["q_proj", "v_proj"]
    heads += ["in_proj"] if family in MAMBA else []  # z, x, B, C and dt in one
    targets = [*heads, "o_proj"] if family in MIXTURES | NO_OUT else "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=targets)
    want = test_peft_in.write_adapter(tmp_path / "base", tmp_path / "adapter", config)
    test_peft_in.compare(want, tmp_path / "base", tmp_path / "adapter", limit=limit(family))
