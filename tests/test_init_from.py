"""`finetune --init_from`: a run begins with what another run, or an adapter of peft, has learned."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_float64, make_folder
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from random_adapter import write_adapter
from safetensors.torch import load_file
from short_runs import QUIET, Settings, assert_same, cut, newest, train
from transformers import AutoModelForCausalLM

from litpeft.core.checksums import file_sha256
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.inspect import as_text, facts
from litpeft.exchange.run import find_run
from litpeft.methods import METHODS

SHORT = QUIET | {"train.epochs": 1}  # two steps


def begun(base: Path, first: Path, out: Path, method: str = "lora", settings: Settings | None = None) -> Path:
    return train(base, out, SHORT | {"init_from": first, "train.lr": 2e-3} | (settings or {}), method)


QUICK = ("lora", "eva", "lq_lora", "ptuning")  # each takes up a saved delta in its own way
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in (*QUICK, "full", "qlora")]


def losses(run: Path) -> list[float]:
    """Returns the losses on the held-out rows, before the first step and later."""
    return [loss for _, loss in newest(run).state["progress"]["validations"]]


@pytest.mark.parametrize("method", [*QUICK, *OTHERS])
def test_a_run_begins_where_another_ended_and_its_resume_is_the_same_run(method: str, tiny_folder, tmp_path) -> None:
    first = train(tiny_folder, tmp_path / "first", SHORT, method)
    whole = begun(tiny_folder, first, tmp_path / "whole", method)
    assert losses(whole)[0] == pytest.approx(losses(first)[-1], abs=1e-6)
    assert abs(losses(whole)[0] - losses(first)[0]) > 1e-4
    shutil.rmtree(first)  # a checkpoint holds all that a resume needs
    settings = SHORT | {"init_from": first, "train.lr": 2e-3, "resume": True}
    assert_same(train(tiny_folder, cut(whole, 1, tmp_path / "cut"), settings, method), whole)


def make_adapter(base: Path, folder: Path, **keys: object) -> Path:
    """Writes an adapter of peft with random tensors; returns its folder."""
    write_adapter(base, folder, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7, **keys))
    return folder


def loss_of(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Returns the mean of -log p over the trained tokens of the rows, of a model of transformers."""
    sums = []
    for row in rows:
        ids = torch.tensor([row.ids])
        targets = torch.where(torch.tensor([row.trained]), ids, -100)[0, 1:]
        sums.append(F.cross_entropy(model(ids).logits[0, :-1], targets, ignore_index=-100, reduction="sum"))
    return sum(sums) / sum(sum(row.trained) for row in rows)


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1},
    "rslora, biases and a norm": {
        "target_modules": ["q_proj"], "use_rslora": True, "bias": "lora_only", "modules_to_save": ["norm"]
    },
    "dora": {"target_modules": ["o_proj"], "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_steps_from_an_adapter_of_peft_are_those_of_peft(case: str, tmp_path) -> None:
    base = make_folder(tmp_path / "base", attention_bias=True)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[case])
    steps = {"train.max_steps": 3, "train.epochs": 3, "train.batch_size": 6, "train.schedule": "constant"}
    exact = {"base.precision": "64-true", "train.max_norm": "null", "train.lr": 5e-3}
    method = "dora" if case == "dora" else "lora"
    run = begun(base, adapter, tmp_path / "run", method, steps | exact)
    tokenizer = Tokenizer.load(base)
    rows = load_dataset(Data(str(tmp_path / "data")), tokenizer, ChatTemplate(tokenizer), 512)
    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = in_float64(PeftModel.from_pretrained(theirs, adapter, is_trainable=True).double()).eval()
    assert losses(run)[0] == pytest.approx(float(loss_of(theirs, rows.validation)), abs=1e-9)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(theirs, rows.train).backward()
        optimizer.step()
    want, got = get_peft_model_state_dict(theirs), load_file(run / "final" / "adapter_model.safetensors")
    before = load_file(adapter / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 1e-8, name
        assert (before[name] - tensor).abs().max() >= 1e-3, name


@pytest.fixture(scope="module")
def first(tiny_folder, tmp_path_factory) -> Path:
    """A run of lora with rank 3. Tests must not change it."""
    out = tmp_path_factory.mktemp("first") / "run"
    return train(tiny_folder, out, SHORT | {"method.rank": 3, "method.dropout": 0.1})


def test_a_run_says_what_it_began_with(first, tiny_folder, tmp_path, capsys) -> None:
    second = begun(tiny_folder, first, tmp_path / "second", settings={"method.lr_ratio": 4.0})
    assert f"begins from  {first}, with its method.rank 3\n" in capsys.readouterr().out
    record = find_run(second).facts
    fingerprint = file_sha256(first / "final" / "delta.safetensors")
    assert record["init_from"] == {"path": str(first), "fingerprint": fingerprint}
    assert newest(second).facts["init_from"] == record["init_from"]
    assert {key: record["settings"][key] for key in ("rank", "dropout", "lr_ratio")} == {
        "rank": 3,
        "dropout": 0.0,
        "lr_ratio": 4.0,
    }
    assert f"| Began with | `{first}` |" in (second / "report.md").read_text()
    assert "init_from" not in find_run(first).facts
    assert re.search(r"^began with +path", "\n".join(as_text(facts(second))), re.MULTILINE)


REFUSED = {
    "another rank": ({"method.rank": 4}, "lora", "was trained with other settings: method.rank is 4 here and 3 there"),
    "other targets": ({"method.targets": '["*.attn.q"]'}, "lora", "hint: leave method.targets out"),
    "another method": ({}, "dora", "is of the method lora, this run of another\nhint: say `finetune lora`"),
    "a place that is not there": ({"init_from": "nowhere"}, "lora", "nowhere: there is no such folder"),
    "its own output": ({"overwrite": True}, "lora", "out: the run would replace"),
}


def refusal(capsys, base: Path, start: Path, out: Path, settings: Settings, method: str = "lora") -> str:
    """Returns what a run says that does not begin."""
    before = sorted(path.name for path in start.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        begun(base, start, out, method, settings)
    assert stop.value.code in (2, 4)
    assert sorted(path.name for path in start.rglob("*")) == before
    return capsys.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, first, tiny_folder, tmp_path, capsys) -> None:
    settings, method, message = REFUSED[case]
    out = first if "overwrite" in settings else tmp_path / "run"
    assert message in refusal(capsys, tiny_folder, first, out, settings, method)


def test_another_base_or_tokenizer_is_refused(first, tiny_folder, tmp_path, capsys) -> None:
    other = make_folder(tmp_path / "other", seed=1)
    said = refusal(capsys, other, first, tmp_path / "run", {})
    assert "the run was trained on other weights" in said
    assert "set base.dir to that" in said
    shutil.copytree(tiny_folder, tmp_path / "same")
    names = tmp_path / "same" / "tokenizer.json"
    content = json.loads(names.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    names.write_text(json.dumps(content))
    said = refusal(capsys, tmp_path / "same", first, tmp_path / "run", {})
    assert "the tokenizer is not the one that" in said


def test_a_model_is_refused_as_it_is_a_base(tiny_folder, tmp_path, capsys) -> None:
    said = refusal(capsys, tiny_folder, tiny_folder, tmp_path / "run", {})
    assert "is a whole model, not what was learned beside one\nhint: begin from it as a base: --base.dir" in said


def test_codes_matter_to_a_method_that_starts_from_them_alone(first, tiny_folder, tmp_path, capsys) -> None:
    second = begun(tiny_folder, first, tmp_path / "second", "qlora", {"train.max_steps": 1})
    assert "a base that was not quantised; here it is in nf4, so the start is not quite" in capsys.readouterr().out
    assert second.exists()
    start = train(tiny_folder, tmp_path / "pissa", SHORT | {"train.max_steps": 1, "base.quantize": "int8"}, "pissa")
    said = refusal(capsys, tiny_folder, start, tmp_path / "run", {}, "pissa")
    assert "they were in int8, and here are not quantised\nhint: say --base.quantize int8" in said
