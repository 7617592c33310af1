"""`method.add_tokens`: only the rows of new tokens train, and every command and the merged folder know the tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import finetune, folded, make_folder
from test_fast_paths import assert_answers_alike, fast
from transformers import AutoModelForCausalLM, AutoTokenizer

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.load import load_model
from litpeft.methods.lora import LoRA
from litpeft.methods.selective import Selective
from litpeft.model.added_tokens import note_tokens
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.gpt import GPT

TOKENS = ("<call>", "<end of call>")
OPTION = "--method.add_tokens", json.dumps(TOKENS)
FIRST = 258  # the tiny tokenizer has two marks and 256 letters


@pytest.fixture(params=[(True, 320), (False, 320), (True, 258), (False, 258)], ids=str)
def base(request, tmp_path) -> Path:
    """A base whose embedding is its head or not, and that has rows to spare for new tokens or none."""
    tied, rows = request.param
    return make_folder(tmp_path / "base", tie_word_embeddings=tied, vocab_size=rows)


def made(folder: Path, dtype: torch.dtype = torch.float64, spread: float = 0.1) -> GPT:
    """Returns a model with rows for the tokens that have learned something."""
    torch.manual_seed(0)
    method = LoRA(rank=2, targets=("*.attn.q",), add_tokens=TOKENS)
    note_tokens(method, Tokenizer.load(folder))
    model = build(folder, dtype, method)
    for parameter in trainable(model).values():
        parameter.data += spread * torch.randn(parameter.shape).to(parameter)
    return model


def test_the_gradient_of_the_rows_is_that_of_the_whole_tables(base) -> None:
    model = made(base)
    plain = build(base, torch.float64).requires_grad_(True)
    rows, tied = model.config.vocab_size, "head.weight" not in model.state_dict()
    assert rows == max(plain.config.vocab_size, FIRST + 2)
    whole = folded(model)
    plain = GPT(model.config).double()
    plain.load_state_dict(whole)
    ids = torch.tensor([[5, FIRST, 9, FIRST + 1, FIRST, 7]])
    for one in (model, plain):
        one.dtype = torch.float64
        one(ids, at=torch.arange(5), targets=ids[0, 1:]).backward()
    assert (model(ids) - plain(ids)).abs().max() <= 1e-10
    grads = {name: parameter.grad for name, parameter in trainable(model).items() if "added_tokens" in name}
    assert grads.keys() == {f"{place}.slot.added_tokens.rows" for place in (["embed"] if tied else ["embed", "head"])}
    for name, grad in grads.items():
        want = plain.get_submodule(name.partition(".")[0]).weight.grad[FIRST : FIRST + 2]
        assert torch.allclose(grad, want, atol=1e-12)


@torch.no_grad()
def test_rows_that_the_base_lacks_start_at_the_mean_and_others_as_they_are(base) -> None:
    model, plain = made(base, spread=0.0), build(base, torch.float64)
    had = plain.config.vocab_size
    for table, before in ((model.embed.weight, plain.embed.weight), (model.head.dense(), plain.head.dense())):
        assert torch.equal(table[:had], before)
        assert torch.allclose(table[had:], before.mean(0).expand(max(0, FIRST + 2 - had), -1))
    ids = torch.arange(40)[None]
    assert torch.allclose(model(ids)[..., :had], plain(ids), atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_answers_on_a_cpu_heed_the_rows(tied: bool, tmp_path) -> None:
    model = made(make_folder(tmp_path, tie_word_embeddings=tied), torch.float32).eval().requires_grad_(False)
    other = fast(model)
    ids = torch.tensor([[FIRST, 4, FIRST + 1]])
    with torch.inference_mode():
        assert (model(ids) - other(ids)).abs().max() <= 1e-5
    assert_answers_alike(model, other, 2e-6)


@pytest.mark.parametrize(("tied", "vocabulary"), [(True, 258), (False, 320)])
def test_a_run_is_answered_evaluated_and_merged_with_its_tokens(tied: bool, vocabulary: int, tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base", tie_word_embeddings=tied, vocab_size=vocabulary)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"Say {word}", "output": f"<call>{word}<end of call>"} for word in ("a", "b", "c")]
    for name in ("train", "validation"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = finetune(base, tmp_path, *OPTION, "--data.path", str(data), "--train.epochs", "3", "--train.lr", "1e-2")
    loaded = load_model(str(run), precision="32-true")
    assert loaded.tokenizer.encode("<call>a")[0] == FIRST
    assert loaded.tokenizer.decode([FIRST, FIRST + 1]) == "<call><end of call>"
    main(["evaluate", str(run), str(data / "validation.jsonl")])
    main(["merge", str(run)])
    assert "differs by" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    ids = AutoTokenizer.from_pretrained(run / "merged")("<call>a<end of call>", return_tensors="pt").input_ids
    assert ids.tolist() == [loaded.tokenizer.encode("<call>a<end of call>")]
    assert ids[0, 0] == FIRST
    with torch.no_grad():
        want = loaded.model(ids)
        assert (theirs(ids).logits - want).abs().max() <= 5e-6 * max(1, want.abs().max())
    merged = load_model(str(run / "merged"), precision="32-true")
    assert merged.tokenizer.encode("x<call>") == loaded.tokenizer.encode("x<call>")
    before, after = build(base, torch.float32).embed.weight, merged.model.embed.weight
    assert torch.equal(before[:FIRST], after[:FIRST])
    assert not torch.equal(after[FIRST], after[FIRST + 1])


@pytest.mark.parametrize(("tokens", "lost"), [(["<call>", "<never>"], "<never>"), (["<call>", "<end of call>"], "")])
def test_a_token_that_no_row_holds_is_told(tokens: list[str], lost: str, tiny_folder, tmp_path, capsys) -> None:
    row = {"instruction": "Say <call>", "output": "x<end of call>"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        "--data.path",
        str(tmp_path / "rows.jsonl"),
        "--method.add_tokens",
        json.dumps(tokens),
        "--dry_run",
        "true",
    ]
    main(["finetune", "lora", "--base.dir", str(tiny_folder), "--out", str(tmp_path / "run"), *words])
    said = capsys.readouterr().out
    assert (
        f"of the first 10,000 rows to train on holds {lost}\n" in said if lost else "rows to train on holds" not in said
    )


def test_the_rows_alone_can_train(tiny_folder) -> None:
    method = Selective(norms=False, add_tokens=TOKENS)
    note_tokens(method, Tokenizer.load(tiny_folder))
    trained = trainable(build(tiny_folder, torch.float32, method))
    assert {name: tuple(p.shape) for name, p in trained.items()} == {
        "embed.slot.added_tokens.rows": (2, 64),
        "head.slot.added_tokens.rows": (2, 64),
    }


@pytest.mark.parametrize(
    ("argv", "method", "message"),
    [
        (["--method.add_tokens", '["<|im_end|>"]'], "lora", "method.add_tokens: '<|im_end|>' is a token of the base"),
        (["--method.add_tokens", '["<a>", "<a>"]'], "lora", "method.add_tokens: '<a>' must be some text, and stand"),
        (["--method.add_tokens", '[" "]'], "lora", "method.add_tokens: ' ' must be some text"),
        ([*OPTION], "full", "method.add_tokens: this method writes a model of the base's own tokens"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(
    argv, method: str, message: str, tiny_folder, tmp_path, capsys
) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune(tiny_folder, tmp_path, *argv, method=method)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_model_takes_no_tokens(tiny_folder) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    tokenizer.where = "tokenizer.model"
    with pytest.raises(ConfigError, match="can be added to a tokenizer.json only"):
        tokenizer.add(TOKENS)
