"""The short check of the rows before a training, and that no message names an option that its command lacks."""

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import test_row_store
from conftest import finetune
from test_data_check import COLOUR, LONG

from litpeft.cli import COMMANDS, main, parse
from litpeft.cli.data import Check, Show
from litpeft.core.errors import UserError
from litpeft.data.prompts import read_prompts
from litpeft.data.settings import Data
from litpeft.data.short_check import concerns
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.evaluate import measure
from litpeft.generate.settings import Evaluate, Generate
from litpeft.train.settings import Base, Finetune

COLOURS = "red", "grey"
SENTENCES = [f"The {colour} bird {number} of the lake sings at noon" for number in range(8) for colour in COLOURS]


def as_rows(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"instruction": asked, "output": said} for asked, said in pairs]


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(base: Path, rows: list[dict[str, str]], folder: Path, **settings: object) -> tuple[DataSet, Tokenizer]:
    tokenizer = Tokenizer.load(base)
    data = Data(written(folder / "rows.jsonl", rows), validation_split=0.0, **settings)
    return load_dataset(data, tokenizer, ChatTemplate(tokenizer), 512), tokenizer


DIFFERENT = as_rows([(text, f"{len(text) * 7} times") for text in SENTENCES])


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        (DIFFERENT, {}, []),
        ([*DIFFERENT, COLOUR | {"output": ""}], {"bad_rows": "skip"}, ["1 row left out for an empty answer"]),
        ([*DIFFERENT, LONG], {"max_length": 150, "overlong": "drop"}, ["length hold 105 trained tokens"]),
        ([*DIFFERENT, DIFFERENT[0]], {}, ["1 row of 17 repeat another"]),
        ([COLOUR, LONG | {"output": LONG["output"] + "Yes."}, LONG], {}, ["1 of 3 rows looked at say nearly the same"]),
        (as_rows([("x" * 480, ".")]), {}, ["only 0.40% of the tokens are trained"]),
        (as_rows([("x" * 480, ".")]), {"mask_prompt": False}, []),
        ([{"text": ". ".join(SENTENCES)}], {"max_length": 60}, []),  # whose pieces are no rows that say the same
    ],
)
def test_what_is_worth_a_look_is_a_line_each(tiny_folder, tmp_path, rows, settings, says) -> None:
    data, tokenizer = loaded(tiny_folder, rows, tmp_path, **settings)
    told = concerns(data, tokenizer, 0, settings.get("mask_prompt", True))
    assert len(told) == len(says), told
    assert all(part in line for part, line in zip(says, told, strict=True)), told


def test_ends_and_beginnings_that_a_template_gets_wrong_are_told(tiny_folder, tmp_path) -> None:
    data, tokenizer = loaded(tiny_folder, DIFFERENT, tmp_path)
    doubled = (replace(row, ids=[tokenizer.bos_id, *row.ids], trained=[False, *row.trained]) for row in data.train)
    data.train = test_row_store.written([[row] for row in doubled])
    data.report.train.ended = 0
    assert [line[:52] for line in concerns(data, tokenizer, 0, True)] == [
        "warning: no row trains the token that ends an answer",
        "warning: 16 rows begin with the token that begins a ",
    ]


def test_a_held_out_row_that_is_nearly_a_row_to_train_on_is_told(tiny_folder, tmp_path) -> None:
    data, tokenizer = loaded(tiny_folder, [*DIFFERENT, LONG], tmp_path)
    near, _ = loaded(tiny_folder, [LONG | {"output": LONG["output"] + "Yes."}, COLOUR], tmp_path)
    data.validation = near.train
    (line,) = concerns(data, tokenizer, 0, True)
    assert "1 of 2 held-out rows looked at say nearly the same as a row to train on" in line


def test_a_run_tells_it_with_a_command_that_says_more_and_can_be_told_not_to(tiny_folder, tmp_path, capsys) -> None:
    rows = written(tmp_path / "my rows.jsonl", [*DIFFERENT, *DIFFERENT])
    finetune(tiny_folder, tmp_path, "--data.path", rows, "--dry_run")
    said = capsys.readouterr().out
    assert "repeat another, token by token\nwhich rows: litpeft data check" in said
    command = shlex.split(re.search(r"which rows: litpeft (.*)", said)[1])
    settings, _, _ = parse("data check", COMMANDS["data check"], command[2:])
    assert (settings.path, settings.model) == (rows, str(tiny_folder))
    with pytest.raises(SystemExit):
        main(command)
    assert "duplicate" in capsys.readouterr().err
    finetune(tiny_folder, tmp_path, "--data.path", rows, "--dry_run", "--check_rows", "false")
    assert "repeat another" not in capsys.readouterr().out


BAD = {
    "no row": [],
    "another shape": [{"Q": "a", "A": "b"}],
    "one of another shape": [COLOUR, {"Q": "a", "A": "b"}],
    "empty": [COLOUR, COLOUR | {"output": ""}],
    "only empty": [COLOUR | {"output": ""}],
    "long": [COLOUR, {"instruction": "x" * 600, "output": "yz"}],
    "only long": [{"instruction": "x" * 600, "output": "yz"}],
}


def words_of(settings: type, prefix: str = "") -> set[str]:
    """Returns the options of settings, dotted."""
    found = set()
    for field in fields(settings):
        inner = field.type if isinstance(field.type, type) else None
        nested = inner is not None and hasattr(inner, "__dataclass_fields__")
        found |= words_of(inner, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}"}
    return found


def finetuned(base: Path, path: str) -> None:
    tokenizer = Tokenizer.load(base)
    for split in (0.0, 0.5):
        settings = Finetune(Base(str(base)), Data(path, validation_split=split), "out")
        data = load_dataset(settings.data, tokenizer, ChatTemplate(tokenizer), 512)
        concerns(data, tokenizer, 0, True)


CALLS = {
    Finetune: finetuned,
    Check: lambda base, path: Check(path, model=str(base), bad_rows="error").load(),
    Show: lambda base, path: Show(path, model=str(base), bad_rows="error").load(),
    Evaluate: lambda base, path: measure(Evaluate(str(base), path, max_new_tokens=1)),
    Generate: lambda base, path: read_prompts(path, False),
}


@pytest.mark.parametrize("settings", CALLS, ids=lambda one: one.__name__.lower())
def test_a_message_on_rows_names_no_option_that_its_command_lacks(settings, tiny_folder, tmp_path) -> None:
    options, told = words_of(settings), []
    others = {field.name for field in fields(Data) if "_" in field.name}  # words that are nothing but options
    paths = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in BAD.items()]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train.csv", "train.jsonl", "valid.jsonl", "val.jsonl"):
        (folder / name).write_text("a,b\n1,2\n")
    for path in (*paths, str(folder), str(tmp_path), str(tmp_path / "missing*"), str(tmp_path / "missing")):
        try:
            CALLS[settings](tiny_folder, path)
        except UserError as error:
            told.append(f"{error.where} {error.what} {error.hint}".replace(str(tmp_path), ""))
    named = {word for text in told for word in re.findall(r"--([\w.]+)|\b((?:data|train)\.[a-z]\w+)(?!\w*[/*])", text)}
    named = {one or other for one, other in named} - {"train.csv", "train.jsonl", "data.jsonl"}
    named |= {word for word in others for text in told if re.search(rf"(?<![\w.]){word}\b", text)}
    assert len(told) >= 5
    assert named <= options, (named - options, told)
