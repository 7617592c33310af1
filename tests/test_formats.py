"""Rows of every format train what the plain chat of messages trains, and tools go through the model's own template."""

import json
import re
from collections import Counter

import pytest
from conftest import CHATML, finetune
from test_row_keys import FRANCE, PERU, content, model, read, said  # noqa: F401

from litpeft.cli import main
from litpeft.core.errors import DataError
from litpeft.data.formats import FORMATS, detect
from litpeft.data.formats.columns import mapped
from litpeft.data.prompts import read_prompts
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer

QUESTION, ANSWER = PERU[0]["content"], PERU[1]["content"]
SHARED = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
SYSTEM = said("system", "Be brief.")

# a row, its format, and the chat that says the same in roles and contents alone
ROWS = {
    "dolly": ({"instruction": QUESTION, "context": "", "response": ANSWER}, "alpaca", PERU),
    "prompt": ({"prompt": QUESTION, "completion": ANSWER}, "prompt_completion", PERU),
    "messages to go on with": (
        {"prompt": [SYSTEM, *FRANCE, PERU[0]], "completion": [PERU[1]]},
        "prompt_completion",
        [SYSTEM, FRANCE[0], FRANCE[1] | {"train": False}, *PERU],
    ),
    "question": ({"question": QUESTION, "answer": ANSWER, "system": "Be brief."}, "question_answer", [SYSTEM, *PERU]),
    "text beside it": ({"question": QUESTION, "answer": ANSWER, "text": None}, "question_answer", PERU),
    "parts": (
        [said("developer", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]), *PERU],
        "messages",
        [SYSTEM, *PERU],
    ),
    "a cell with messages": ({"messages": json.dumps(PERU), "tools": "", "system": None}, "messages", PERU),
    "sharegpt": ({"conversations": SHARED, "system": "Be brief."}, "sharegpt", [SYSTEM, *PERU]),
    "switched off": (
        {"conversations": [said_ | {"train": False} if said_["from"] == "gpt" else said_ for said_ in SHARED] + SHARED},
        "sharegpt",
        [PERU[0], PERU[1] | {"train": False}, *PERU],
    ),
    "preference": ({"prompt": QUESTION, "chosen": ANSWER, "rejected": "Rio."}, "preference", PERU),
    "preferred chats": (
        {"prompt": QUESTION, "chosen": PERU, "rejected": [PERU[0], said("assistant", "Rio.")]} | {"prompt": [PERU[0]]},
        "preference",
        PERU,
    ),
    "preferred chats alone": ({"chosen": PERU, "rejected": PERU[:1]}, "preference", PERU),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_known_by_its_keys_and_trains_what_the_plain_chat_trains(name, tmp_path, model) -> None:  # noqa: F811
    row, form, chat = ROWS[name]
    data = read(tmp_path, model, row, chat)
    assert data.train[0].ids == data.train[1].ids
    assert data.train[0].trained == data.train[1].trained
    assert data.report.formats == Counter([form, "messages"])
    assert data.report.unread == ({"rejected": 1} if form == "preference" else {})
    note = {"preference": "; only the chosen answer is trained: see preference.loss"}.get(form, "")
    assert f"{form} (1 row{note})" in str(data.report) or form == "messages"


def test_other_services_answer_as_the_assistant() -> None:
    for name in ("gpt", "chatgpt", "bing", "bard", "model"):
        chat = [{"from": "human", "value": "a"}, {"from": name, "value": "b"}]
        assert [turn.role for turn in FORMATS["sharegpt"].turns({"conversations": chat})] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"instruction": "a", "prompt": "b", "output": "c"}, "the row has the keys of alpaca and prompt_completion"),
        ({"question": "a", "answer": "b", "response": "c"}, "answer and response could both be the answer"),
        ({"question": "a", "title": "b"}, "answer is missing"),
        ({"text": "a", "label": "b"}, "the row has the keys 'text', 'label'; known formats are"),
        (
            {"prompt": [PERU[0]], "completion": [PERU[1]], "system": "x"},
            "prompt is a list of messages, which must hold",
        ),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from must be one of human, gpt, system"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "conversations[0].value is empty"),
        ({"conversations": SHARED, "output": "x"}, "output is not supported"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen must be a string, got int"),
        (
            {"messages": [said("user", [{"type": "image_url"}])]},
            "content[0] must be a part of the type text, got 'image",
        ),
        (
            {"messages": [said("user", "a", tool_call_id="1")]},
            "messages[0].tool_call_id belongs to a message of the role",
        ),
        ({"messages": [said("assistant", None, tool_calls=[{"name": 1}])]}, "tool_calls[0] must be a call with name"),
    ],
)
def test_a_wrong_key_is_named(record: dict, told: str) -> None:
    with pytest.raises(ValueError) as error:
        FORMATS[detect(record)].turns(record)
    assert told in str(error.value)


# documents


def test_a_text_is_trained_whole_and_cut_without_losing_a_token(tmp_path, model) -> None:  # noqa: F811
    tokenizer, _ = model
    text = "Lima <|im_end|> is old. " * 30
    whole = read(tmp_path, model, {"text": text, "url": "x"}, system="Be brief.")
    (row,) = whole.train
    assert tokenizer.decode(row.ids, False) == "<|im_start|>" * tokenizer.adds_bos + text + "<|im_end|>"
    assert row.trained == [False] + [True] * (len(row.ids) - 1)
    assert row.ids.count(tokenizer.token_id("<|im_end|>")) == 1  # what the text spells is no special token
    assert whole.report.train.ended == 1
    assert "not read    the keys url (1 row)" in str(whole.report)
    pieces = read(tmp_path, model, {"text": text}, max_length=100).train
    assert [i for p in pieces for i, t in zip(p.ids, p.trained, strict=True) if t] == row.ids[1:]
    with pytest.raises(DataError, match="no row is left to train on"):
        read(tmp_path, model, {"text": text}, max_length=100, overlong="drop")


# columns of one's own


@pytest.mark.parametrize(
    ("columns", "row", "chat"),
    [
        ({"user": "q", "assistant": "a"}, {"q": QUESTION, "a": ANSWER}, PERU),
        (
            {"system": "Be {how}.", "user": "{q}\n{of}?", "assistant": "{a}"},
            {"how": "brief", "q": "Say", "of": 3, "a": 4.5},
            [SYSTEM, said("user", "Say\n3?"), said("assistant", "4.5")],
        ),
        ({"messages": "dialogue"}, {"dialogue": PERU}, PERU),
        ({"messages": "dialogue", "system": "role"}, {"dialogue": SHARED, "role": "Be brief."}, [SYSTEM, *PERU]),
    ],
)
def test_columns_are_mapped(columns, row, chat, tmp_path, model) -> None:  # noqa: F811
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    data = read(tmp_path, model, row | {"id": 1}, columns=columns)
    (plain,) = load_dataset(Data(str(path), validation_split=0.0), *model, 4096).train
    assert (data.train[0].ids, data.train[0].trained) == (plain.ids, plain.trained)
    assert data.report.unread == {"id": 1}
    asked = {key: value for key, value in row.items() if key != "a"}
    if "messages" not in columns:
        (tmp_path / "asked.jsonl").write_text(json.dumps(asked))
        (prompt,) = read_prompts(str(tmp_path / "asked.jsonl"), False, columns=columns)
        assert prompt.content == plain.turns[:-1]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"usr": "q"}, "data.columns maps system, user, input, thinking, assistant, weight, messages, text; got 'usr'"),
        ({"assistant": "q"}, "data.columns needs user and assistant, or messages, or text; got assistant"),
        ({"user": "q", "text": "t"}, "data.columns has user, text"),
        ({"user": "{q", "assistant": "a"}, "data.columns.user: '{q' is no text with columns in braces"),
        ({"user": "{q!r}", "assistant": "a"}, "data.columns.user must be a column, or a text with {column} in it"),
    ],
)
def test_a_mapping_that_is_wrong_is_named(columns, told) -> None:
    with pytest.raises(ValueError) as error:
        Data("rows.jsonl", columns=columns)
    assert told in str(error.value)
    with pytest.raises(ValueError, match="exclude each other"):
        Data("rows.jsonl", columns={"user": "q", "assistant": "a"}, format="alpaca")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"q": "x"}, "the column 'a' is missing; the row has 'q'"),
        ({"q": "x", "a": ""}, "a is empty"),
        ({"q": ["x"], "a": "y"}, "q must be a text or a number, got list"),
        ({"q": "x", "a": "y", "images": ["z"]}, "images is not supported"),
    ],
)
def test_a_row_that_a_mapping_does_not_fit_is_named(row, told) -> None:
    with pytest.raises(ValueError) as error:
        mapped({"user": "q", "assistant": "a"}).turns(row)
    assert told in str(error.value)


# tools

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a town", "parameters": {"type": "object"}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Lima"}'}}
CALLS = [
    said("user", "Lima?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    said("tool", "18 degrees", tool_call_id="c1", name="weather"),
    said("assistant", "Cool."),
]
WITH_TOOLS = (  # as Qwen2.5's template writes them
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(model, source: str):  # noqa: F811
    tokenizer = Tokenizer(**{k: v for k, v in vars(model[0]).items() if k in Tokenizer.__dataclass_fields__})
    tokenizer.chat_template = source
    return tokenizer, ChatTemplate(tokenizer)


def test_tools_and_calls_go_through_the_models_template_and_calls_are_trained(tmp_path, model) -> None:  # noqa: F811
    from transformers.utils.chat_template_utils import render_jinja_template

    using = with_template(model, WITH_TOOLS)
    shared = {
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Lima?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Lima"}}'},
            {"from": "observation", "value": "18 degrees"},
            {"from": "gpt", "value": "Cool."},
        ],
    }
    data = read(tmp_path, using, {"messages": CALLS, "tools": [TOOL]}, shared)
    row = data.train[0]
    text = using[0].decode(row.ids, False)
    assert text.startswith(f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>user\nLima?")
    chat = json.loads(json.dumps(CALLS).replace("null", '""'))
    chat[1]["tool_calls"][0]["function"]["arguments"] = {"town": "Lima"}
    assert text == render_jinja_template([chat], [TOOL], chat_template=WITH_TOOLS)[0][0]  # as transformers writes it
    call = '<call>{"name": "weather", "arguments": {"town": "Lima"}}</call><|im_end|>'
    trained = using[0].decode([i for i, t in zip(row.ids, row.trained, strict=True) if t], False)
    assert trained == f"{call}Cool.<|im_end|>"
    assert (data.train[1].ids, data.train[1].trained) == (row.ids, row.trained)
    assert not data.report.unread
    asked = FORMATS["messages"].asked({"messages": CALLS[:3], "tools": [TOOL]})
    assert using[1].prompt(asked) == row.ids[: len(row.ids) - len("Cool.") - 2]  # the end of the turn, a line break


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": PERU, "tools": [TOOL]}, "the row has tools, and the chat template does not write them"),
        ({"messages": CALLS}, "the assistant calls tools, and the chat template does not write the calls"),
    ],
)
def test_a_template_that_leaves_tools_out_refuses_the_row(row, told, tmp_path, model) -> None:  # noqa: F811
    with pytest.raises(DataError, match=told):
        read(tmp_path, with_template(model, CHATML), row)


# the same reader everywhere


def test_a_table_trains_evaluates_and_answers(tiny_folder, tmp_path, capsys) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("frage,antwort\n" + "".join(f"Farbe {i}?,rot\n" for i in range(6)))
    with pytest.raises(SystemExit, match="3"):
        finetune(tiny_folder, tmp_path, "--data.path", str(rows), "--train.max_steps", "1")
    told = capsys.readouterr().err
    hint = """to map them: --data.columns '{"user": "frage", "assistant": "antwort"}'"""
    assert hint in told.replace("\n  ", "\n")
    columns = {"user": "frage", "assistant": "antwort"}
    weights = json.dumps({str(rows): 2})
    shape = ["--data.columns", json.dumps(columns), "--train.max_steps", "1", "--data.validation_split", "0"]
    run = finetune(tiny_folder, tmp_path, "--data.path", weights, *shape)
    told = capsys.readouterr().out
    assert f"file        {rows}: 6 rows, each 2 times an epoch" in told
    assert "format      columns (6 rows)" in told
    assert "train       12 rows" in told
    main(["evaluate", str(run), str(rows), "--max_new_tokens", "2", "--columns", json.dumps(columns)])
    assert "6 rows" in capsys.readouterr().out
    out = ["--output", str(tmp_path / "o.jsonl"), "--sampling.max_new_tokens", "2"]
    main(["generate", str(run), "--input", str(rows), "--columns", '{"user": "frage"}', *out])
    assert "antwort (6 rows)" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])) == ["frage", "antwort", "answer"]


def test_plain_text_trains_and_is_measured_by_its_loss_alone(tiny_folder, tmp_path, capsys) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {i}. It rained." for i in range(8)))
    text = ["--data.path", str(tmp_path / "book.txt"), "--data.documents", "paragraph", "--train.max_steps", "1"]
    run = finetune(tiny_folder, tmp_path, *text)
    (tmp_path / "rows.jsonl").write_text('{"text": "It rained."}\n')
    capsys.readouterr()
    main(["evaluate", str(run), str(tmp_path / "rows.jsonl")])
    told = capsys.readouterr().out
    assert "0/0" in told
    assert re.search(r"loss, nats per token +\d", told)
