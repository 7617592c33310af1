"""Runs that learned on experts or on latent attention: merged into a GGUF file, and as an adapter on the base's."""

import pytest
import torch
from conftest import finetune
from llama_cpp import next_token, of_model, server
from test_gguf_out import PROMPTS, ROWS, made

from litpeft.core.errors import ConfigError
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.model.build import build

LEARN = "--train.max_steps", "4", "--train.lr", "1e-2"
RANKS = "--method.ranks", '{"*.experts.1.*": 3}'


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
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


LEFT_OUT = {  # family -> target, and what the error says of it
    "deepseek_v3, q_a": ("*.attn.q_a", r"blocks.0.attn.q_a \(blk.0.attn_q_a.weight\), and llama.cpp's deepseek2"),
    "deepseek_v3, kv_b": ("*.attn.kv_b", r"blocks.0.attn.kv_b \(blk.0.attn_k_b.weight\), and llama.cpp's deepseek2"),
    "gemma4_text": ("layer_inputs.project", r"layer_inputs.project \(per_layer_model_proj.weight\), .*'s gemma4"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_adapter_that_llama_cpp_would_leave_out_is_refused(tmp_path_factory, tmp_path, name: str) -> None:
    (target, said), base = LEFT_OUT[name], made(tmp_path_factory, name.partition(",")[0])[0]
    run = finetune(base, tmp_path, *LEARN, "--method.targets", f'["{target}"]')
    with pytest.raises(ConfigError, match=f"the run changes {said} adds no adapter to it"):
        convert(Convert(str(run), str(tmp_path / "adapter"), to="gguf-adapter"))
    if "kv_b" in name:
        convert(Convert(str(run), str(tmp_path / "merged"), to="gguf", type="f32"))
        want = of_model(load_model(str(run), precision="32-true").model, PROMPTS[1])
        with server(tmp_path / "merged" / "model.gguf") as client:
            assert (next_token(client, PROMPTS[1], ROWS) - want).abs().max() <= 1e-5
