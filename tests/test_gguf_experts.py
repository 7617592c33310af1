"""Runs that learned on experts or on latent attention: merged into a GGUF file, and as an adapter on the base's."""

import pytest
import torch
from conftest import finetune
from llama_cpp import next_token, of_model, server
from test_gguf_out import LEARN, PROMPTS, ROWS, made

from litpeft.core.errors import ConfigError
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.model.build import build

RANKS = "--method.ranks", '{"*.experts.1.*": 3}'


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_llama_cpp_computes_with_experts_that_learned_what_the_run_computes(tmp_path_factory, tmp_path, family) -> None:
    base, file = made(tmp_path_factory, family)
    targets = '["*.experts.*", "*.shared.*", "*.attn.o"]' if family == "deepseek_v3" else '["*.experts.*", "*.attn.q"]'
    run = finetune(base, tmp_path, *LEARN, "--method.targets", targets, *RANKS)
    loaded, before = load_model(str(run), precision="32-true").model, build(base, torch.float32)
    convert(Convert(str(run), str(tmp_path / "merged"), to="gguf", type="f32"))
    convert(Convert(str(run), str(tmp_path / "adapter"), to="gguf-adapter"))
    for path, lora in ((tmp_path / "merged" / "model.gguf", None), (file, tmp_path / "adapter" / "adapter.gguf")):
        with server(path, lora) as client:
            for prompt in PROMPTS:
                want = of_model(loaded, prompt)
                assert (next_token(client, prompt, ROWS) - want).abs().max() <= 1e-5
                assert (of_model(before, prompt) - want).abs().max() > 1e-2


@pytest.mark.parametrize("layer", ["q_a", "kv_b"])
def test_an_adapter_that_llama_cpp_would_leave_out_is_refused(tmp_path_factory, tmp_path, layer: str) -> None:
    base, _ = made(tmp_path_factory, "deepseek_v3")
    run = finetune(base, tmp_path, *LEARN, "--method.targets", f'["*.attn.{layer}"]')
    said = rf"the run changes blocks\.0\.attn\.{layer} \(blk\.0\..*\), and llama.cpp's deepseek2 adds no adapter to it"
    with pytest.raises(ConfigError, match=said):
        convert(Convert(str(run), str(tmp_path / "adapter"), to="gguf-adapter"))
    convert(Convert(str(run), str(tmp_path / "merged"), to="gguf", type="f32"))
    loaded = load_model(str(run), precision="32-true").model
    with server(tmp_path / "merged" / "model.gguf") as client:
        assert (next_token(client, PROMPTS[1], ROWS) - of_model(loaded, PROMPTS[1])).abs().max() <= 1e-5
