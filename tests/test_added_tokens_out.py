"""Runs with `method.add_tokens` leave litpeft: merged, as GGUF, for peft; and they resume as the same run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from llama_cpp import ask, next_token, of_model, server, write_bpe
from peft import PeftModel
from short_runs import QUIET, assert_same, cut, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from litpeft.cli import main
from litpeft.generate.load import load_model
from litpeft.model.families.read import read_config

TOKENS = ("<call>", "<end of call>")
TEXT = "<call>a b<end of call>."
SETTINGS = QUIET | {"train.epochs": 1, "train.lr": 2e-2, "method.add_tokens": json.dumps(TOKENS)}


@pytest.fixture(scope="module", params=[(True, 330), (False, 330), (False, 317)], ids=str)
def run(request, tmp_path_factory) -> Path:
    """A run on a base whose head is its embedding or not, with rows to spare or none. Tests must not change it."""
    tied, rows = request.param
    folder = tmp_path_factory.mktemp("added")
    base = write_bpe(make_folder(folder / "base", tie_word_embeddings=tied, vocab_size=rows))
    (folder / "data").mkdir()
    rows = [{"instruction": f"Say {word}", "output": f"<call>{word}<end of call>"} for word in "abcdef"]
    for name, some in (("train", rows), ("validation", rows[:2])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return train(base, folder / "run", SETTINGS | {"data.path": folder / "data"})


def test_it_resumes_as_the_same_run(run, tmp_path) -> None:
    settings = SETTINGS | {"data.path": run.parent / "data", "resume": True}
    assert_same(train(run.parent / "base", cut(run, 1, tmp_path / "cut"), settings), run)


@torch.no_grad()
def test_transformers_and_llama_cpp_compute_with_the_tokens_what_the_run_computes(run, tmp_path, capsys) -> None:
    loaded = load_model(str(run), precision="32-true")
    ids = loaded.tokenizer.encode(TEXT)
    assert {loaded.tokenizer.backend.ids[token] for token in TOKENS} == {317, 318}
    assert {317, 318} <= {*ids}
    want, rows = loaded.model(torch.tensor([ids])), loaded.model.config.vocab_size
    main(["merge", str(run), "--out", str(tmp_path / "merged")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT, return_tensors="pt").input_ids
    assert read.tolist() == [ids]
    assert (theirs(read).logits - want).abs().max() <= 5e-6 * max(1, want.abs().max())
    main(["convert", str(run), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "gguf")])
    with server(tmp_path / "gguf" / "model.gguf") as client:
        assert ask(client, "/tokenize", content=TEXT)["tokens"] == ids
        assert ask(client, "/detokenize", tokens=ids)["content"] == TEXT
        for prompt in (ids, ids[:1], ids[:-1]):
            assert (next_token(client, prompt, rows) - of_model(loaded.model, prompt)).abs().max() <= 1e-5


@torch.no_grad()
def test_peft_has_the_rows_where_the_base_has_room_for_them(run, tmp_path, capsys) -> None:
    loaded, base = load_model(str(run), precision="32-true"), run.parent / "base"
    if read_config(base)[1].vocab_size == 317:
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(run), "--to", "peft", "--out", str(tmp_path / "peft")])
        assert stop.value.code == 4
        said = capsys.readouterr().err
        assert "adds tokens to the vocabulary of its base, whose embedding has 317 rows and none for them" in said
        assert f"`litpeft merge {run}` makes a model of it" in said
        return
    main(["convert", str(run), "--to", "peft", "--out", str(tmp_path / "peft")])
    ids = torch.tensor([loaded.tokenizer.encode(TEXT)])
    want = loaded.model(ids)
    for folder in (tmp_path / "peft", run / "final"):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        assert (theirs(ids).logits - want).abs().max() <= 2e-6 * want.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "peft")(TEXT).input_ids == ids[0].tolist()
    back = load_model(str(tmp_path / "peft"), precision="32-true")
    assert back.tokenizer.encode(TEXT) == ids[0].tolist()
    assert (back.model(ids) - want).abs().max() <= 2e-6 * want.abs().max()
