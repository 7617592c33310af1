"""Every key of a row is read, refused by its name, or counted; and no text of a row becomes a special token."""

import csv
import json

import pytest
from chat_samples import bpe
from test_formats import CALLS, TOOL, WITH_TOOLS
from test_templates import INJECTED, special_ids
from test_thinking import THEIRS

from litpeft.data.builtin import BUILT_IN
from litpeft.data.formats import FORMATS, keys
from litpeft.data.formats.columns import mapped
from litpeft.data.formats.pair import ANSWERS, BESIDE
from litpeft.data.formats.turn import Turn
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer

COLUMNS = {"user": "user", "assistant": "assistant", "system": "persona", "thinking": "why"}
MAPPED = {"user": "a", "assistant": "b", "persona": "c", "why": "d"}
SHAPES = FORMATS | {"columns": mapped(COLUMNS)}
ROWS = {name: dict(one.example) for name, one in FORMATS.items()} | {"columns": MAPPED}
KNOWN = [*keys.REFUSED, *keys.THINKING, *BESIDE, *ANSWERS, "prompt", "question", "instruction", "messages", "chosen"]
OTHER = ["id", "score", "source", "refusal", "parallel_tool_calls", "end_turn", "Reasoning", "\x1b[31m", ""]


def fate(form, row, key, value):
    """Returns what becomes of a key: refused, counted or read; "" if it vanishes."""
    try:
        turns = form.turns(row)
    except ValueError as error:
        return "refused" if key in str(error) else f"error that does not name it: {error}"
    found = form.unread(row)
    if key in found or f"messages[].{key}" in found or f"conversations[].{key}" in found:
        return "counted"
    return "read" if value in repr(turns) else ""


@pytest.mark.parametrize("name", SHAPES)
def test_no_key_of_a_row_vanishes(name):
    form = SHAPES[name]
    for key in [*KNOWN, *OTHER]:
        if key not in ROWS[name]:
            row = ROWS[name] | {key: "UNLIKELY"}
            assert fate(form, row, key, "UNLIKELY") in ("refused", "counted", "read"), key
            assert form.turns(ROWS[name] | {key: None})  # nothing is no mistake


@pytest.mark.parametrize(("name", "role"), [("messages", "user"), ("messages", "assistant"), ("sharegpt", "gpt")])
def test_no_key_of_a_message_vanishes(name, role):
    form = FORMATS[name]
    for key in [*KNOWN, *OTHER, "name", "weight"]:
        row = json.loads(json.dumps(ROWS[name]))
        for message in row[form.key]:
            if message[form.role] == role:
                message[key] = "UNLIKELY"
        assert fate(form, row, key, "UNLIKELY") in ("refused", "counted", "read"), key


def test_a_switch_is_read_and_what_is_none_is_refused_by_its_name():
    for name, form in SHAPES.items():
        if name == "columns":
            continue
        for key in keys.SWITCHES:
            on = 1 if key == "weight" else True
            assert form.turns(ROWS[name] | {key: on}) == form.turns(ROWS[name])
            assert key not in form.unread(ROWS[name] | {key: on})
            with pytest.raises(ValueError, match=f"^{key} says that the row is not to be trained"):
                form.turns(ROWS[name] | {key: type(on)(0)})
            with pytest.raises(ValueError, match=f"^{key} must be"):
                form.turns(ROWS[name] | {key: -0.5})


# special tokens that a row spells

SPELT = " and ".join([*INJECTED, "<|user|>", "<|endoftext|>", "<think>", "</tool_call>"])
TOKENS = ["<s>", "</s>", "<|endoftext|>", *dict.fromkeys(token for one in BUILT_IN.values() for token in one.tokens)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer in which every token of every template is special."""
    folder = tmp_path_factory.mktemp("special")
    bpe(TOKENS).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.load(folder)


def told(text):
    """Returns a row of each format that says `text` wherever it can say something."""

    def said(role, **more):
        return {"role": role, "content": f"{role} {text}"} | more

    thinking = {"reasoning": f"hm {text}"}
    calls = json.loads(json.dumps(CALLS))
    calls[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"town": f"Lima {text}"})
    for message in (calls[0], calls[2], calls[3]):
        message["content"] += text
    return {
        "alpaca": {k: f"{k} {text}" for k in ("instruction", "output", "input", "system")}
        | {"history": [[f"a {text}", f"b {text}"]]},
        "prompt_completion": {k: f"{k} {text}" for k in ("prompt", "completion")} | thinking,
        "question_answer": {k: f"{k} {text}" for k in ("question", "answer", "system")} | thinking,
        "preference": {k: f"{k} {text}" for k in ("prompt", "chosen", "rejected")},
        "messages": {"messages": [said("system"), said("user"), said("assistant", **thinking), said("user"),
                                  said("assistant", reasoning_content=f"so {text}")]},
        "in the text": {"messages": [said("user"), said("assistant") | {"content": f"<think>{text}</think>{text}"}]},
        "calls": {"messages": calls, "tools": [TOOL]},
        "sharegpt": {"conversations": [{"from": who, "value": f"{who} {text}"} for who in ("human", "gpt")]},
        "text": {"text": f"text {text}"},
    }  # fmt: skip


def tokens(tokenizer, template, path, **settings):
    data = Data(str(path), None, 0.0, thinking="keep", bad_rows="skip", **settings)
    return load_dataset(data, tokenizer, template, 1 << 20)


SOURCES = THEIRS | {"tools": WITH_TOOLS}


@pytest.mark.parametrize("name", [*BUILT_IN, *SOURCES])
def test_no_text_of_a_row_becomes_a_special_token_in_any_format_and_template(name, tokenizer, tmp_path):
    if name in SOURCES:
        tokenizer = Tokenizer(**{k: v for k, v in vars(tokenizer).items() if k in Tokenizer.__dataclass_fields__})
        tokenizer.chat_template = SOURCES[name]
    template = ChatTemplate(tokenizer, "model" if name in SOURCES else name)
    plain, spelt = (told(text) for text in ("plain", SPELT.replace("<think>", "").replace("</tool_call>", "")))
    known = [shape for shape in plain if shape != "calls" or name == "tools"]
    known = [
        shape for shape in known if shape != "alpaca" or name != "never"
    ]  # a user's text has </think>-free answers
    for number, rows in enumerate((plain, spelt)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(rows[shape]) + "\n" for shape in known))
    clean, dirty = (tokens(tokenizer, template, tmp_path / f"{number}.jsonl") for number in (0, 1))
    assert clean.rejected == dirty.rejected == []
    assert len(clean.train) == len(dirty.train) >= len(known)
    for one, other in zip(clean.train, dirty.train, strict=True):
        assert special_ids(tokenizer, one.ids) == special_ids(tokenizer, other.ids)
        assert one.ended
        assert other.ended
        assert tokenizer.decode(other.ids, skip_special=False).count("<|im_end|>") > tokenizer.decode(
            one.ids, skip_special=False
        ).count("<|im_end|>")


def test_a_tool_that_spells_a_special_token_is_refused(tokenizer, tmp_path):
    tokenizer = Tokenizer(**{k: v for k, v in vars(tokenizer).items() if k in Tokenizer.__dataclass_fields__})
    tokenizer.chat_template = WITH_TOOLS
    tool = json.loads(json.dumps(TOOL).replace("Of a town", "Of a town<|im_end|>"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CALLS, "tools": [tool]}) + "\n" + json.dumps(CALLS))
    data = tokens(tokenizer, ChatTemplate(tokenizer), tmp_path / "rows.jsonl")
    assert [bad.reason for bad in data.rejected] == ["a tool's description spells a special token"]


def write(path, rows):
    """Writes rows as a file of the kind that its name says."""
    kind = path.suffix
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif kind == ".xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(row)
        book.save(path)
    else:
        path.write_text(rows[0]["answer"])


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet", "xlsx", "txt"])
def test_no_file_brings_in_a_special_token(kind, tokenizer, tmp_path):
    template = ChatTemplate(tokenizer, "chatml")
    ids = []
    for text in ("plain", SPELT):
        write(tmp_path / f"rows.{kind}", [{"question": f"q {text}", "answer": f"a {text}"}])
        (row,) = tokens(tokenizer, template, tmp_path / f"rows.{kind}").train
        ids.append(special_ids(tokenizer, row.ids))
        assert ("<|eot_id|>b" in tokenizer.decode(row.ids, skip_special=False)) == (text is SPELT)
    assert ids[0] == ids[1]


def test_a_prompt_for_an_answer_holds_no_special_token_of_its_turns(tokenizer):
    for name in BUILT_IN:
        template = ChatTemplate(tokenizer, name)
        plain, spelt = (
            template.prompt([Turn("user", f"q {text}"), Turn("assistant", f"a {text}", thinking=f"t {text}"),
                             Turn("user", f"r {text}")])
            for text in ("plain", SPELT)
        )  # fmt: skip
        assert special_ids(tokenizer, plain) == special_ids(tokenizer, spelt)
