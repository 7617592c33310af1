"""An answer ends for transformers where it ends for litpeft, in every folder that is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, finetune, make_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.generate.engine import answer
from litpeft.generate.load import load_model
from litpeft.generate.settings import Sampling

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1 and 2; the template ends a turn with the last
QUESTION = [{"role": "user", "content": "Colour of sky?"}]
LEARN = "--train.epochs", "40", "--train.lr", "1e-2", "--train.schedule", "constant", "--validation.interval", "40"


def write_base(folder: Path) -> Path:
    """Writes a base that says it ends with a token which its chat template does not write."""
    make_folder(folder, bos_token_id=0, eos_token_id=0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: finetune(base, folder, *LEARN, method=name, out=name) for name in ("lora", "full")}


def ends_of(folder: Path) -> object:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def written_by_transformers(folder: Path, prompt: list[int]) -> list[int]:
    """Returns what transformers writes after the prompt, as its generation_config.json has it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


def written_by_litpeft(path: Path) -> tuple[list[int], list[int]]:
    """Returns a prompt, and what litpeft answers to it up to and without the token that ends the answer."""
    loaded = load_model(str(path), precision="32-true")
    prompt = loaded.template.prompt(QUESTION)
    [said] = answer(loaded.model, [prompt], loaded.tokenizer, Sampling(max_new_tokens=24), loaded.template.stop_ids)
    assert said.reason == "stop"
    return prompt, said.ids


def test_transformers_stops_where_litpeft_stops_in_a_merged_folder(runs, base, capsys) -> None:
    assert ends_of(base) == 0
    capsys.readouterr()
    main(["merge", str(runs["lora"])])
    said = capsys.readouterr().out
    assert said.count("generation_config.json now names the ids that end an answer, 0 and 2; it named 0\n") == 1
    merged = runs["lora"] / "merged"
    assert ends_of(merged) == [0, 2]
    prompt, ids = written_by_litpeft(runs["lora"])
    assert written_by_transformers(merged, prompt) == [*ids, 2]
    (merged / "generation_config.json").write_text((base / "generation_config.json").read_text())
    assert len(written_by_transformers(merged, prompt)) == 24  # as the base says it, it does not stop


def test_transformers_stops_where_litpeft_stops_in_the_result_of_full(runs) -> None:
    final = runs["full"] / "final"
    assert ends_of(final) == [0, 2]
    prompt, ids = written_by_litpeft(runs["full"])
    assert written_by_transformers(final, prompt) == [*ids, 2]


def test_convert_writes_the_ids_that_end_an_answer(base, tmp_path, capsys) -> None:
    source = write_base(tmp_path / "bin")
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    (source / "generation_config.json").unlink()  # then transformers takes what config.json says
    main(["convert", str(source), str(tmp_path / "hf")])
    assert "now names the ids that end an answer, 0 and 2; it named 0" in capsys.readouterr().out
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [0, 2]}


def test_a_folder_that_says_it_already_is_left_as_it_is(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path)
    capsys.readouterr()
    main(["merge", str(run)])
    assert "generation_config" not in capsys.readouterr().out
    copied = (run / "merged" / "generation_config.json").read_bytes()
    assert copied == (tiny_folder / "generation_config.json").read_bytes()


def test_a_folder_without_the_file_gets_it_even_if_config_json_says_the_same(tiny_folder, tmp_path, capsys) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "generation_config.json").unlink()
    run = finetune(base, tmp_path)
    capsys.readouterr()
    main(["merge", str(run)])
    assert "generation_config" not in capsys.readouterr().out
    written = json.loads((run / "merged" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": 1}


def test_a_folder_whose_template_cannot_be_used_is_converted_with_a_word(tmp_path, capsys) -> None:
    source = write_base(tmp_path / "bin")
    torch.save(AutoModelForCausalLM.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    (source / "chat_template.jinja").write_text("{% broken")
    main(["convert", str(source), str(tmp_path / "hf")])
    assert "generation_config.json is left as it is, since an answer's end is not known" in capsys.readouterr().out
    assert ends_of(tmp_path / "hf") == 0
