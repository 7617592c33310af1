"""`litpeft.run` and `litpeft.load`: the commands and a model in Python, beside what the terminal gives."""

import json
import re
from pathlib import Path

import pytest
from conftest import finetune, make_folder, write_rows
from safetensors.torch import load_file

import litpeft
from litpeft.cli import dispatch
from litpeft.core.errors import ConfigError, DataError, UserError
from litpeft.generate.llm import LLM

QUESTIONS = ["red", "What is it?", "a b c"]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide weights, so that answers differ from prompt to prompt."""
    return make_folder(tmp_path_factory.mktemp("models") / "wide", seed=7, initializer_range=0.25)


@pytest.fixture(scope="module")
def run(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(wide_folder, tmp_path_factory.mktemp("python"), "--train.lr", "0.01")


@pytest.fixture(scope="module")
def llm(run: Path) -> LLM:
    return litpeft.load(run, precision="32-true")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Returns what a command prints to stdout."""
    capsys.readouterr()
    dispatch([*map(str, words)], [], 0.0)
    return capsys.readouterr().out


def test_a_run_in_python_is_the_run_of_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--train.epochs", "2", "--method.rank", "4", "--method.targets", '["*.attn.q"]']
    typed = finetune(tiny_folder, tmp_path, *words, out="typed")
    rows, called = write_rows(tmp_path), tmp_path / "called"
    litpeft.run(
        "finetune lora",
        base={"dir": tiny_folder, "precision": "32-true"},
        data={"path": rows},
        out=called,
        train={"epochs": 2, "warmup_steps": 0, "batch_size": 3},
        method={"rank": 4, "targets": ("*.attn.q",)},
    )
    one, other = (load_file(folder / "final/delta.safetensors") for folder in (typed, called))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_values_that_stand_alone_and_dicts_are_given_as_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    litpeft.run("new", source=tiny_folder, out=tmp_path / "new", changes={"num_hidden_layers": 1}, dtype="bfloat16")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (1, "bfloat16")


def test_answers_are_those_of_the_command_alone_and_many_at_once(run: Path, llm: LLM, capsys) -> None:
    words = ["generate", run, "--precision", "32-true", "--sampling.max_new_tokens", 12]
    expected = [said(capsys, *words, "--prompt", question).removesuffix("\n") for question in QUESTIONS]
    assert len({*expected}) > 1
    assert [llm.generate(question, max_new_tokens=12) for question in QUESTIONS] == expected
    assert llm.generate(QUESTIONS, max_new_tokens=12, batch_size=2) == expected
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert llm.generate(asked, max_new_tokens=12) == expected
    assert llm.generate(asked[1], max_new_tokens=12) == expected[1]
    pieces = list(llm.stream(QUESTIONS[0], max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == expected[0]
    raw = said(capsys, *words, "--raw", "true", "--prompt", "red").removesuffix("\n")
    assert llm.generate("red", raw=True, max_new_tokens=12) == raw
    assert llm.generate([]) == []


def test_the_base_answers_while_what_was_learned_is_off(wide_folder: Path, llm: LLM) -> None:
    base = litpeft.load(wide_folder, precision="32-true")
    with llm.base():
        answers = llm.generate(QUESTIONS, max_new_tokens=12)
    assert answers == base.generate(QUESTIONS, max_new_tokens=12)
    assert answers != llm.generate(QUESTIONS, max_new_tokens=12)
    with pytest.raises(ConfigError, match="no finetuned part"):
        base.base()


def test_errors_are_raised_and_say_what_the_terminal_says(tiny_folder: Path, llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no command 'finetune lorra' .did you mean \"finetune lora\""):
        litpeft.run("finetune lorra")
    with pytest.raises(ConfigError, match="there is no option --train.learning_rate .*train.lr"):
        litpeft.run("finetune lora", base={"dir": tiny_folder}, train={"learning_rate": 1})
    with pytest.raises(UserError, match="are required"):
        litpeft.run("merge")
    with pytest.raises(DataError, match=r"prompt: messages\[0\].content is missing"):
        llm.generate([{"role": "user"}])
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("red", temprature=1.0)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(litpeft, "lode", *[])


def test_the_page_on_python_runs_as_it_stands(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    root = Path(__file__).parent.parent
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/SmolLM2-135M-Instruct").symlink_to(tiny_folder)
    data = tmp_path / "config_hub/data/orders"
    data.mkdir(parents=True)
    for name in ("train", "validation"):
        rows = (root / f"config_hub/data/orders/{name}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(rows[:8]))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (root / "tutorials/python.md").read_text(), re.S)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    assert (tmp_path / "out/orders/merged/model.safetensors").is_file()
