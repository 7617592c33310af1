"""Keys of rows and messages: what they say reaches the model, is refused by name, or is counted in the report."""

import json

import pytest
from conftest import write_tokenizer

from litpeft.data.formats import FORMATS, chosen, detect
from litpeft.data.formats.turn import Turn
from litpeft.data.prompts import content as content_of
from litpeft.data.prompts import read_prompts, unread
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer


def content(row, raw):
    return content_of(row, raw, chosen("auto", None, to_answer=True)(row)[1])


def said(role: str, text: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": text, **more}


PERU = [said("user", "And of Peru?"), said("assistant", "Lima.")]
FRANCE = [said("user", "Capital of France?"), said("assistant", "Paris.")]
UNTRAINED = [FRANCE[0], FRANCE[1] | {"train": False}, *PERU]
INSTRUCTION = {"instruction": "And of Peru?", "output": "Lima."}

# a row, and the chat that says the same in roles and contents alone
READ = {
    "history": (INSTRUCTION | {"history": [["Capital of France?", "Paris."]]}, [*FRANCE, *PERU]),
    "no history": (INSTRUCTION | {"history": [], "context": "", "system": None, "tools": []}, PERU),
    "context": (INSTRUCTION | {"context": "Of states."}, [said("user", "And of Peru?\n\nOf states."), PERU[1]]),
    "system before history": (
        INSTRUCTION | {"history": [["Capital of France?", "Paris."]], "system": "Be brief."},
        [said("system", "Be brief."), *FRANCE, *PERU],
    ),
    "system beside messages": ({"system": "Be brief.", "messages": PERU}, [said("system", "Be brief."), *PERU]),
    "the same system twice": (
        {"system": "Be brief.", "messages": [said("system", "Be brief."), *PERU]},
        [said("system", "Be brief."), *PERU],
    ),
    "loss": ([FRANCE[0], FRANCE[1] | {"loss": False}, *PERU], UNTRAINED),
    "weight": ([FRANCE[0], FRANCE[1] | {"weight": 0}, PERU[0], PERU[1] | {"weight": 1}], UNTRAINED),
    "training": ([FRANCE[0], FRANCE[1] | {"training": False, "train": None}, *PERU], UNTRAINED),
    "a row that is switched on": (INSTRUCTION | {"train": True, "weight": 1.0}, PERU),
    "nothing to call": ([PERU[0] | {"tool_calls": []}, PERU[1] | {"reasoning_content": ""}], PERU),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ChatTemplate]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = Tokenizer.load(folder)
    return tokenizer, ChatTemplate(tokenizer)


def read(tmp_path, model, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(Data(str(path), **{"validation_split": 0.0} | settings), *model, 4096)


@pytest.mark.parametrize("name", READ)
def test_a_key_with_a_meaning_trains_what_the_plain_chat_trains(name, tmp_path, model):
    row, chat = READ[name]
    data = read(tmp_path, model, row, chat)
    assert data.train[0].ids == data.train[1].ids
    assert data.train[0].trained == data.train[1].trained
    assert not data.report.unread


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (INSTRUCTION | {"input": "a", "context": "b"}, "input and context mean the same"),
        (INSTRUCTION | {"context": ["a"]}, "context must be a string, got list"),
        (INSTRUCTION | {"history": "a"}, "history must be a list of [question, answer], got str"),
        (INSTRUCTION | {"history": [["a"]]}, "history[0] must be [question, answer]"),
        (INSTRUCTION | {"history": [["a", 1]]}, "history[0][1] must be a string, got int"),
        (INSTRUCTION | {"history": [["a", ""]]}, "history[0][1] is empty"),
        (INSTRUCTION | {"train": False}, "train says that the row is not to be trained"),
        (INSTRUCTION | {"weight": -0.3}, "weight must be 0, or a number from 0.000001 to 1000, got -0.3"),
        (INSTRUCTION | {"reasoning": ["hm"]}, "reasoning must be a string, got list"),
        (INSTRUCTION | {"reasoning": "hm", "thinking": "so"}, "reasoning and thinking are two thoughts: keep one"),
        (INSTRUCTION | {"reasoning": "hm", "output": "<think>so</think>x"}, "and the answer has </think> too"),
        (INSTRUCTION | {"tools": [1]}, "tools is not supported"),
        (INSTRUCTION | {"system_prompt": "x"}, "system_prompt is not supported: call the key system"),
        ({"messages": PERU, "system": 3}, "system must be a string, got int"),
        ({"messages": [said("system", "a"), *PERU], "system": "b"}, "system and messages[0] are two system messages"),
        ({"messages": PERU, "history": [["a", "b"]]}, "history is not supported: the row has messages"),
        ({"messages": PERU, "context": "a"}, "context is not supported: the row has messages"),
        ({"messages": PERU, "weight": 0}, "weight says that the row is not to be trained"),
        (
            {"messages": PERU, "rejected": "x"},
            "rejected is not supported: two answers are compared where",
        ),
        ({"messages": PERU, "chat_template_kwargs": 3}, "chat_template_kwargs must be an object, got 3"),
        ({"messages": PERU, "enable_thinking": "no"}, "enable_thinking must be true or false, got 'no'"),
        (
            INSTRUCTION | {"chat_template_kwargs": '{"enable_thinking": true}', "enable_thinking": False},
            "enable_thinking and chat_template_kwargs contradict each other",
        ),
        ({"text": "a", "enable_thinking": True}, "enable_thinking is not supported: the option template_options"),
        ([PERU[0], PERU[1] | {"loss": 0.5}], "messages[1].loss must be true or false, got 0.5"),
        (
            [PERU[0], PERU[1] | {"weight": True}],
            "messages[1].weight must be 0, or a number from 0.000001 to 1000, got True",
        ),
        ([PERU[0], PERU[1] | {"loss": True, "train": False}], "messages[1].train and loss contradict each other"),
        ([PERU[0] | {"loss": True}, PERU[1]], "messages[0].loss can be true for the assistant only"),
        ([PERU[0] | {"thinking": "hm"}, PERU[1]], "messages[0].thinking is not supported: only an answer of the"),
        ([PERU[0], PERU[1] | {"thinking": "a</think>b"}], "messages[1].thinking holds the thoughts, and it has </thi"),
        ({"text": "a", "reasoning": "hm"}, "reasoning is not supported: only an answer of the assistant has thoughts"),
    ],
)
def test_a_key_that_would_be_lost_is_refused_by_name(record, told):
    with pytest.raises(ValueError) as error:
        FORMATS[detect(record)].turns(record)
    assert told in str(error.value)


def test_keys_without_a_meaning_are_counted_and_named_in_one_line(tmp_path, model):
    chat = {"messages": [PERU[0] | {"name": "Ann"}, PERU[1] | {"name": "Bob"}], "id": 1, "prompt": "And of Peru?"}
    data = read(tmp_path, model, INSTRUCTION | {"id": 2, "\x1b[31mred": ""}, chat, INSTRUCTION | {"id": 3})
    line = r"not read    the keys id (3 rows), \x1b[31mred (1 row), messages[].name (1 row), prompt (1 row)"
    assert line in str(data.report).splitlines()
    assert "not read" not in str(read(tmp_path, model, INSTRUCTION, {"messages": PERU, "system": "x"}).report)


def test_rows_to_answer_are_read_by_the_same_rules(tmp_path):
    asked = [Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "q", input="c")]
    row = {"history": [["a", "b"]], "context": "c", "system": "Be brief."}
    assert content(row | {"instruction": "q"}, raw=False) == content(row | {"prompt": "q"}, raw=False) == asked
    chat = {"messages": [said("user", "q")], "system": "Be brief."}
    assert content(chat, raw=False) == [Turn("system", "Be brief."), Turn("user", "q")]
    for wrong in ({"prompt": "q", "tools": [1]}, {"messages": [said("user", "q")], "history": [["a", "b"]]}):
        with pytest.raises(ValueError, match="is not supported"):
            content(wrong, raw=False)
    with pytest.raises(ValueError, match="raw continues the text in `prompt`; this row has history"):
        content({"prompt": "q", "history": []}, raw=True)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "id": 1}) + "\n" + json.dumps(chat | {"id": 2, "score": 1}) + "\n")
    assert unread(read_prompts(str(path), raw=False)) == {"id": 2, "score": 1}


def test_what_a_row_to_answer_says_of_training_is_told_to_have_no_effect(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = {"messages": [said("user", "q"), said("assistant", "a") | {"loss": True}, said("user", "q")], "weight": 1}
    rows = [{"prompt": "q", "loss": False}, {"instruction": "q", "train": True}, chat]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert unread(read_prompts(str(path), raw=False)) == {"loss": 1, "train": 1, "weight": 1, "messages[].loss": 1}
    path.write_text(json.dumps(rows[0]) + "\n")
    assert unread(read_prompts(str(path), raw=True)) == {"loss": 1}
