"""SmolLM2 back to GGUF, in llama.cpp: LITPEFT_GGUF=FILE pytest -m slow tests/test_gguf_out_real.py"""

import os
from pathlib import Path

import pytest
from llama_cpp import ask, complete, of_model, server
from tiny_gguf import strings

from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.engine import answer
from litpeft.generate.load import load_model
from litpeft.generate.settings import Sampling

FILE = Path(os.environ.get("LITPEFT_GGUF", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="LITPEFT_GGUF names no SmolLM2 GGUF file"),
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(Convert(str(FILE), str(out)))
    return out


@pytest.mark.parametrize(("type_", "limit"), [("f32", 2e-3), ("f16", 2e-2)])
def test_llama_cpp_answers_as_litpeft_does(folder, tmp_path, type_: str, limit: float) -> None:
    convert(Convert(str(folder), str(tmp_path / "out"), to="gguf", type=type_))
    loaded = load_model(str(folder), precision="32-true")
    stop, tokenizer = loaded.template.stop_ids, loaded.tokenizer
    prompts = [tokenizer.encode("The capital of France is"), loaded.template.prompt(CHAT)]
    ours = answer(loaded.model, prompts, tokenizer, Sampling(max_new_tokens=32), stop)
    with server(tmp_path / "out" / "model.gguf", context=512) as client:
        for prompt, own in zip(prompts, ours, strict=True):
            said = complete(client, prompt, 32, n_probs=20)
            assert [token for token in said["tokens"] if token not in stop] == own.ids
            want = of_model(loaded.model, prompt)
            listed = said["completion_probabilities"][0]["top_logprobs"]
            assert max(abs(entry["logprob"] - float(want[entry["id"]])) for entry in listed) <= limit
        asked = ask(client, "/apply-template", messages=CHAT)["prompt"]
        for text in (asked, *(text for text in strings(100) if text and "\0" not in text)):
            assert ask(client, "/tokenize", content=text)["tokens"] == tokenizer.encode(text), text
