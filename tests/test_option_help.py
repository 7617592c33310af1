"""`litpeft COMMAND --help`, and what is said to a key that does not exist."""

import dataclasses
import json
import re
import shlex
from contextlib import suppress

import pytest
from conftest import kinds

from litpeft.cli import COMMANDS, main, parse
from litpeft.cli.suggestions import MEANINGS, suggest
from litpeft.core.kinds import choices
from litpeft.core.precision import PRECISIONS
from litpeft.core.safetensors import RESULT_DTYPES
from litpeft.model.quantize import STORAGES


def said(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


def offered(text: str) -> list[str]:
    """Returns the keys of the rows of a help text, in their order."""
    options = re.split(r"\n(?:required|options)\n", text, maxsplit=1)[1]
    return [key.lower() for key in re.findall(r"^  (?:--)?([A-Za-z][\w.]*)(?: |$)", options, re.M)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_offers_each_key_once_and_nothing_that_is_refused(name: str, capsys) -> None:
    keys = offered(said(capsys, *name.split(), "--help"))
    assert sorted(keys) == sorted([*kinds(name), "config", "print_config"])
    if COMMANDS[name].method:
        assert keys[:3] == ["base.dir", "data.path", "out"]
        own = [key for key in keys if key.startswith("method.")]
        assert keys[3 : 3 + len(own)] == own
        assert name == "finetune full" or own[-1] == "method.unfreeze"  # what they share comes after what is their own


@pytest.mark.parametrize("name", ["finetune lora", "finetune full", "evaluate", "generate", "chat", "merge", "convert"])
def test_help_shows_every_choice_and_each_of_them_is_taken(name: str, capsys) -> None:
    text = said(capsys, *name.split(), "--help")
    words = shlex.split(COMMANDS[name].example)
    found = {key: choices(kind) for key, kind in kinds(name).items() if choices(kind)}
    assert found
    for key, values in found.items():
        shown = ["null" if value is None else value for value in values]
        assert f"--{key} {'|'.join(shown)}" in text.replace("|\n      ", "|")
        for value, word in zip(values, shown, strict=True):
            more = {"base.double_quantize": ["--base.quantize", "nf4"], "type": ["--to", "gguf"]}
            more = (more | {"validation.metric": ["--preference.loss", "dpo"]}).get(key, [])
            settings, method, _ = parse(name, COMMANDS[name], [*words, *more, f"--{key}", word])
            group, _, leaf = key.rpartition(".")
            holder = method if group == "method" else getattr(settings, group) if group else settings
            assert getattr(holder, leaf) == value


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_parses(name: str, capsys) -> None:
    line = re.search(r"^  litpeft (.*?)\n\n", said(capsys, *name.split(), "--help"), re.M | re.S)[1]
    assert line.startswith(name)
    line = line.replace("\\\n", "")
    parse(name, COMMANDS[name], shlex.split(line)[len(name.split()) :])


@pytest.mark.parametrize("name", ["", "finetune", *COMMANDS])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_into_the_terminal(name: str, columns: int, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with suppress(SystemExit):
        main([*name.split(), "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > columns] == []


def test_help_says_where_a_word_may_stand_for_a_number(capsys) -> None:
    assert "--train.micro_tokens INTEGER|auto" in said(capsys, "finetune", "lora", "--train.help")


@pytest.mark.parametrize("group", ["base", "data", "train", "preference", "validation", "checkpoint", "method"])
def test_a_group_has_a_help_of_its_own(group: str, capsys) -> None:
    part = said(capsys, "finetune", "lora", f"--{group}.help")
    keys = re.findall(r"^  --(\S+)", part, re.M)
    assert sorted(keys) == sorted(key for key in kinds("finetune lora") if key.startswith(f"{group}."))
    whole = said(capsys, "finetune", "lora", "--help")
    assert all(line in whole for line in part.splitlines())


THEIRS = {
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "modules_to_save": "method.unfreeze",
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.max_norm",
    "gradient_checkpointing": "train.activation_checkpointing",
    "warmup_steps": "train.warmup_steps",
    "eval_steps": "validation.interval",
    "save_total_limit": "checkpoint.keep_last",
    "output_dir": "out",
    "load_in_4bit": "base.quantize",
    "bnb_4bit_use_double_quant": "base.double_quantize",
}


def test_the_names_of_peft_and_transformers_lead_to_ours() -> None:
    from inspect import signature

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    known = {field.name for theirs in (LoraConfig, TrainingArguments) for field in dataclasses.fields(theirs)}
    known |= set(signature(BitsAndBytesConfig).parameters)
    assert set(THEIRS) <= known
    ours = kinds("finetune lora")
    for word, key in THEIRS.items():
        group = key.partition(".")[0]
        for spelled in (word, word.replace("_", "-"), f"{group}.{word}", f"training.{word}"):
            assert suggest(spelled, ours) == f' (did you mean "{key}"?)', spelled


def test_every_key_of_the_table_exists_and_is_what_its_words_lead_to() -> None:
    commands = [kinds(name) for name in COMMANDS]
    for key, words in MEANINGS.items():
        having = [keys for keys in commands if key in keys]
        assert having, key
        for word in words.split():
            free = [keys for keys in having if word not in keys]
            assert any(f'"{key}"' in suggest(word, keys) for keys in free), (key, word)


@pytest.mark.parametrize(
    ("command", "key", "says"),
    [
        ("finetune full", "method.rank", "; method has add_tokens, unfreeze, master_weights, "),
        ("finetune lora", "base_dir", ' (did you mean "base.dir"?)'),
        ("finetune lora", "base-dir", ' (did you mean "base.dir"?)'),
        ("finetune lora", "train.learnin_rate", "; train has batch_size, micro_tokens, "),
        ("finetune lora", "train.batchsize", ' (did you mean "train.batch_size"?)'),
        ("finetune lora", "trian.seed", ' (did you mean "train.seed"?)'),
        ("finetune lora", "seed", ' (did you mean "data.seed" or "train.seed"?)'),
        ("finetune lora", "data.lr", ' (did you mean "train.lr"?)'),
        ("finetune lora", "lrn_rote_zz", ""),
        ("finetune lora", "zz", ""),
        ("evaluate", "bad_rows", "; data.bad_rows belongs to litpeft finetune"),
        ("evaluate", "data.max_length", "; data.max_length belongs to litpeft finetune"),
        ("evaluate", "overlong", "; data.overlong belongs to litpeft finetune"),
        ("evaluate", "base.quantize", ' (did you mean "quantize"?)'),
        ("chat", "method.rank", "; method.rank belongs to litpeft finetune"),
        ("finetune lora", "sampling.temperature", "; sampling.temperature belongs to litpeft generate"),
        ("generate", "max_length", ' (did you mean "sampling.max_new_tokens"?)'),
        ("generate", "temperature", ' (did you mean "sampling.temperature"?)'),
        ("generate", "max_tokens", ' (did you mean "sampling.max_new_tokens"?)'),
    ],
)
def test_a_key_that_does_not_exist_is_guessed_by_meaning_and_within_its_group(command, key: str, says: str) -> None:
    found = suggest(key, kinds(command))
    assert found.startswith(says) if says else found == ""


def test_a_yaml_key_of_another_tool_is_answered_with_ours_and_its_line(tmp_path, capsys) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"model_name_or_path": "m"}))
    with pytest.raises(SystemExit):
        main(["finetune", "lora", "--config", str(file)])
    assert f'{file}:1: there is no key "model_name_or_path" (did you mean "base.dir"?)' in capsys.readouterr().err


def test_the_choices_are_what_the_code_behind_them_has() -> None:
    train, answers, merge = (kinds(name) for name in ("finetune lora", "generate", "merge"))
    assert {*choices(train["base.precision"]), "16-true"} == {"auto", *PRECISIONS}
    assert set(choices(answers["precision"])) == {"auto", *(name for name in PRECISIONS if "mixed" not in name)}
    assert choices(train["base.quantize"]) == choices(answers["quantize"]) == [*STORAGES, None]
    assert choices(merge["dtype"]) == choices(kinds("convert")["dtype"]) == [*RESULT_DTYPES, None]
