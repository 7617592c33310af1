"""SmolLM2 as a GGUF, against transformers' own reader: LITPEFT_GGUF=FILE pytest -m slow tests/test_convert_real.py"""

import os
from pathlib import Path

import pytest
import torch
from tiny_gguf import strings
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert

FILE = Path(os.environ.get("LITPEFT_GGUF", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="LITPEFT_GGUF names no SmolLM2 GGUF file"),
]
# What llama.cpp gives for spaces before a digit, where transformers' GGUF reader does not cut (xllamacpp 2026.10).
LLAMA_CPP = {
    "a  2": [81, 256, 34],
    "a   12 b": [81, 333, 33, 34, 278],
    "x=\t\t3": [104, 45, 1656, 35],
    "\n\n\n 5": [1116, 3805, 37],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(Convert(str(FILE), str(out), dtype="float32"))
    return out


def test_ids_are_those_of_transformers_and_of_llama_cpp(folder):
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    texts = strings(600)
    plain = [text for text in texts if not any(letter.isnumeric() for letter in text)]
    assert len(plain) > 100
    assert [ours(text).input_ids for text in plain] == [theirs(text).input_ids for text in plain]
    # its reader leaves out the cut at every digit that this tokenizer was trained with; put in, all are equal
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert {text: ours(text).input_ids for text in LLAMA_CPP} == LLAMA_CPP
    assert [ours.decode(ours(text).input_ids) for text in texts] == texts


def test_logits_are_those_of_transformers_own_reader_and_the_answer_is_paris(folder):
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(**ids).logits, theirs(**ids).logits, rtol=0, atol=1e-5)
        answer = ours.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].size(1) :])
