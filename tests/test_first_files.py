"""The files that a new user has: how they are called and saved, what is wrong with them, and what is said of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from litpeft.cli.data import Check, check
from litpeft.core.errors import DataError
from litpeft.data.chats import Chats
from litpeft.data.formats import FORMATS, detect
from litpeft.data.report import Report
from litpeft.data.settings import Data
from litpeft.data.sources import find
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.engine import generate
from litpeft.generate.settings import Generate, Sampling

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(path: Path, **settings) -> tuple[Report, list]:
    data = Data(str(path), **settings)
    chats = Chats(data, Report("model", 99))
    sources, _ = find(data.path, None)
    found = [chat.turns for chat in chats.read(sources)]
    return chats.report, found


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as error:
        read(path)
    return error.value


def test_a_weight_makes_no_duplicates_and_the_clean_copy_keeps_every_row(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(5)))
    settings = Check({str(rows): 2}, model=str(tiny_folder), fix=str(tmp_path / "clean.jsonl"))
    check(settings)
    assert "rows        5 to train on" in capsys.readouterr().out
    assert (tmp_path / "clean.jsonl").read_text() == rows.read_text()
    check(replace(settings, fix=None))  # which would be an error if a check failed


def test_an_empty_question_is_no_empty_answer(tiny_folder, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\na,b\n,c\nd,\n")
    found = tmp_path / "found.json"
    with pytest.raises(DataError, match="2 of 10 checks failed"):
        check(Check(str(rows), model=str(tiny_folder), json=str(found)))
    counts = {
        one["name"]: [row["where"][-1] for row in one["rows"]] for one in json.loads(found.read_text())["findings"]
    }
    assert (counts["unusable"], counts["empty_answer"]) == (["3", "4"], ["4"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": False},  # TRL's rows for KTO
        {"prompt": [USER], "completion": [ANSWER], "label": "False"},  # the same from a table
        {"messages": [USER, ANSWER], "kto_tag": False},
    ],
)
def test_an_answer_that_its_row_calls_bad_is_not_learnt(row):
    with pytest.raises(ValueError, match="the answer is a bad one, and it would be learnt"):
        FORMATS[detect(row)].turns(row)
    good = row | {key: True for key in ("label", "kto_tag") if key in row}
    assert FORMATS[detect(good)].turns(good)[-1].content == "b"
    assert FORMATS["question_answer"].turns({"question": "a", "answer": "no", "label": False})[-1].content == "no"


def test_a_list_of_messages_is_read_by_the_keys_that_its_messages_have():
    openai, shared = [USER, ANSWER | {"id": 3}], [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for key in ("messages", "conversations"):
        form = FORMATS[detect({key: openai})]
        assert form.turns({key: openai}) == FORMATS["messages"].turns({"messages": openai})
        assert form.turns({key: shared}) == FORMATS["sharegpt"].turns({"conversations": shared})
        assert form.unread({key: openai}) == {f"{key}[].id"}
    with pytest.raises(ValueError, match="conversations\\[1\\].role must be one of system, .*, got 'bot'"):
        FORMATS["sharegpt"].turns({"conversations": [USER, {"role": "bot", "content": "b"}]})


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"Question from customer": "a", "Our reply": "b"},
            {"user": "Question from customer", "assistant": "Our reply"},
        ),
        ({"id": 1, "query": "a", "response": "b"}, {"user": "query", "assistant": "response"}),
        ({"inputs": "a", "targets": "b", "task": "c"}, {"user": "inputs", "assistant": "targets"}),
        (
            {"type": "c", "response": "b", "query": "a", "original_question": "d"},
            {"user": "query", "assistant": "response"},
        ),
        ({"conversation": [USER, ANSWER], "id": "c"}, {"messages": "conversation"}),
        ({"a": "x", "b": "y"}, {"user": "a", "assistant": "b"}),
        ({"body": "x"}, {"text": "body"}),
    ],
)
def test_an_unknown_shape_is_told_a_mapping_that_then_reads_it(row, parts, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    told = refused(path).hint.partition("to map them: --data.columns '")[2].removesuffix("'")
    assert json.loads(told) == parts
    assert len(read(path, columns=parts)[1]) == 1


def test_rows_with_other_faults_are_not_told_to_map_their_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    image = {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}
    rows = {"question": "a", "answer": None}, {"messages": None}, image, {"text": None}
    for text in ('{"question": "a", "answer": NaN}\n', "{}\n", *map(json.dumps, rows)):
        path.write_text(text)
        assert "to map them" not in refused(path).hint


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "faq.csv",
            "question;answer\nWie groß?;klein\n".encode("cp1252"),
            "where Windows-1252 has 'ß': save the file as",
        ),
        ("rows.jsonl", json.dumps({"text": "a"}, indent=2).encode(), "one row stands on one line of a .jsonl file"),
        ("rows.json", b'{"version": 1, "data": [{"text": "a"}]}', "an object with the keys 'version', 'data'"),
        ("rows.jsonl", b'[{"question": "a", "answer": "b"}]\n', "the line is a list of rows: give the file a name"),
        (
            "tree.jsonl",
            b'{"text": "a", "message_id": "1", "parent_id": "0"}\n',
            "parent_id is not supported: the text is",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_its_own_words(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert told in str(refused(tmp_path / name))


def test_the_line_with_which_excel_names_the_separator_is_no_header(tmp_path):
    (tmp_path / "faq.csv").write_text("sep=;\r\nquestion;answer\r\na, b;c\r\n")
    _, [[question, answer]] = read(tmp_path / "faq.csv")
    assert (question.content, answer.content) == ("a, b", "c")
    (tmp_path / "bad.csv").write_text("sep=;\nquestion;answer\na\n")
    assert "bad.csv:3: it has 1 cell" in str(refused(tmp_path / "bad.csv"))


def test_a_call_of_a_tool_that_the_row_does_not_offer_is_refused(tiny_folder):
    said = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | default([]) | tojson }}\n{% endfor %}"
    source = "{{ tools | tojson }}" + said
    template = ChatTemplate(replace(Tokenizer.load(tiny_folder), chat_template=source))
    row = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [USER, ANSWER | {"content": ""}],
    }
    for name in ("weather", "whether"):
        row["messages"][1]["tool_calls"] = [{"function": {"name": name, "arguments": {}}}]
        turns = FORMATS["messages"].turns(row)
        if name == "weather":
            assert name in template.spans(turns).text
        else:
            with pytest.raises(ValueError, match="calls 'whether', which is not among the row's tools"):
                template.spans(turns)


def test_a_title_above_the_header_of_a_sheet_is_told_where_names_belong(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (["Our questions", None], ["question", "answer"], ["a", "b"]):
        book.active.append(cells)
    book.active.merge_cells("A1:B1")
    book.save(tmp_path / "faq.xlsx")
    assert "cell B2 stands in a column without a name: row 1 has the names of the columns" in str(
        refused(tmp_path / "faq.xlsx")
    )


@pytest.mark.parametrize("name", ["rows", "a folder with a name that is as long as those of people's downloads " * 3])
def test_a_folder_of_mixed_files_is_told_a_glob_that_finds_some(name, tmp_path):
    (tmp_path := tmp_path / name).mkdir()
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("question,answer\na,b\n")
    glob = refused(tmp_path).hint.partition("name the files: ")[2].strip("'")
    assert [path.name for path in tmp_path.glob(Path(glob).name)] == ["a.csv"]


def test_rows_that_differ_in_their_input_alone_are_no_near_duplicates(tiny_folder, tmp_path):
    rows, found = tmp_path / "rows.jsonl", tmp_path / "found.json"
    asked = {"instruction": "Is the review below a friendly one? Answer with yes or no.", "output": "yes"}
    inputs = "the food was cold but the waiter was kind", "a wonderful film about a dog and his three cats"
    rows.write_text("".join(json.dumps(asked | {"input": text}) + "\n" for text in (*inputs, inputs[0] + "!")))
    check(Check(str(rows), model=str(tiny_folder), json=str(found)))
    near = {one["name"]: one["rows"] for one in json.loads(found.read_text())["findings"]}["near_duplicate"]
    assert [row["where"][-2:] for row in near] == [":3"]


def test_rows_with_an_answer_are_answered_under_another_key(tiny_folder, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    given = [{"question": "a", "answer": "b"}, {"question": "c"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    generate(Generate(str(tiny_folder), input=str(rows), output=str(out), sampling=Sampling(max_new_tokens=2)))
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer_2"} for row in written] == given
    assert all(isinstance(row["answer_2"], str) for row in written)
    assert "the rows have answers already; those of the model are called answer_2" in capsys.readouterr().err
