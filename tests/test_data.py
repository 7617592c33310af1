"""Files to rows: bad rows are named with their line, good ones are never lost, and nothing is cut without a word."""

import gzip
import json
import random
import re

import pytest
from chat_samples import CHATML, STYLES, chats, write_folder

from litpeft.core.errors import DataError, UserError
from litpeft.data.formats import FORMATS, detect
from litpeft.data.formats.turn import Turn
from litpeft.data.readers import records
from litpeft.data.rows import show
from litpeft.data.settings import Data
from litpeft.data.sources import Source, find, find_measured, split
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_folder(tmp_path_factory.mktemp("chatml"), "chatml"))


@pytest.fixture(scope="module")
def template(tokenizer):
    return ChatTemplate(tokenizer)


def alpaca(number: int, words: int = 3) -> dict[str, str]:
    return {"instruction": f"Count to {number}.", "output": " ".join(map(str, range(number, number + words)))}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tokenizer, template, path, max_positions=4096, **settings):
    return load_dataset(Data(str(path), **{"validation_split": 0.0} | settings), tokenizer, template, max_positions)


# settings and formats


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("overlong", "x", "data.overlong must be error, drop or split, got 'x'"),
        ("bad_rows", "warn", "data.bad_rows must be error or skip, got 'warn'"),
        ("format", "csv", "data.format must be auto, preference, messages"),
        ("template", "llama", "data.template must be auto, model, alpaca, chatml, llama-2"),
        ("validation_split", 1.0, "data.validation_split must be at least 0 and below 1, got 1.0"),
        ("max_length", 1, "data.max_length must be at least 2"),
        ("seed", -1, "data.seed must be at least 0"),
    ],
)
def test_a_wrong_setting_is_told_as_the_user_typed_it(key, value, told):
    with pytest.raises(ValueError) as error:
        Data("rows.jsonl", **{key: value})
    assert told in str(error.value)


def test_an_alpaca_row_is_a_chat_of_two_or_three_turns():
    assert FORMATS["alpaca"].turns({"instruction": "a", "input": "b", "output": "c", "system": "d", "id": 7}) == [
        Turn("system", "d"),
        Turn("user", "a", input="b"),
        Turn("assistant", "c"),
    ]
    assert FORMATS["alpaca"].turns({"instruction": "a", "input": None, "output": "c"})[0] == Turn("user", "a")


def test_a_bare_list_of_messages_is_a_row_too():
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": "b", "train": False}]
    assert FORMATS["messages"].turns(chat) == FORMATS["messages"].turns({"messages": chat})
    assert [turn.trained for turn in FORMATS["messages"].turns(chat)] == [False, False]
    assert detect(chat) == detect({"messages": chat}) == "messages"
    assert detect({"instruction": "", "output": ""}) == "alpaca"


@pytest.mark.parametrize("name", FORMATS)
def test_the_row_that_messages_show_for_a_format_is_found_to_be_of_it(name):
    row = FORMATS[name].example
    assert detect(row) == name
    assert FORMATS[name].unread(row) == ({"rejected"} if name == "preference" else set())


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"instruction": "a"}, "output is missing"),
        ({"instruction": 3, "output": "b"}, "instruction must be a string, got int"),
        ({"instruction": "a", "output": None}, "output must be a string, got null"),
        ({"instruction": "a", "output": " \n"}, "output is empty"),
        ({"instruction": "a", "input": [], "output": "b"}, "input must be a string, got list"),
        (
            {"x": "x", "n": 1},
            "the row has the keys 'x', 'n'; known formats are preference, messages, ",
        ),
        ({}, "the row has the keys (none)"),
        (3, "the row has int"),
        ({"messages": None}, "messages must be a list, got null"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [USER, 3]}, "messages[1] must be an object"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1].role is missing"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role must be one of system, developer, user"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, "messages[1].content[0] must be a part"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "train": 1}]}, "messages[1].train must be true"),
        ({"messages": [USER | {"train": True}]}, "messages[0].train can be true for the assistant only"),
        ({"messages": [USER | {"tool_calls": [1]}]}, "messages[0].tool_calls must be a list, in a message of the as"),
        ({"messages": [USER], "tools": [1]}, "tools must be a list of objects"),
    ],
)
def test_a_wrong_key_is_named(record, told):
    with pytest.raises(ValueError) as error:
        FORMATS[detect(record)].turns(record)
    assert told in str(error.value)


# files

GOOD = [alpaca(i) for i in range(4)]
BAD_LINES = {
    b'{"instruction": "a", "output": "b"': "not JSON at column",
    b'{"instruction": "a" "output": "b"}': "not JSON at column 21: Expecting ',' delimiter",
    b'{"instruction": "a", "output": "b"} {"x": 1}': "more after the end of the row, at column 37",
    b'{"instruction": "a", "output": "\xff"}': "not UTF-8 at byte 33",
    b'{"instruction": "a", "output": "\\ud800"}': "lone surrogate",
    b'{"instruction": "a", "output": "b", "n": NaN}': "NaN is not a JSON number",
    b'{"instruction": "a", "output": "b", "n": -Infinity}': "-Infinity is not a JSON number",
    b'{"instruction": "a", "output": "b", "n": 1e999}': "too large",
    b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}": "5000 digits",
    b'{"instruction": "a", "output": "b", "output": "c"}': "the key 'output' appears twice",
    b'{"instruction": "a", "output": "b\x00"}': "not JSON at column",
    b'{"instruction": "a", "output": "b\\u0000"}': "NUL",
    b"[" * 100000: "nested too deeply",
    b"\x00": "not JSON",
    b"null": "the row has NoneType",
    b'"text"': "the row has str",
    b'{"instruction": "a"}': "output is missing",
    b'{"instruction": "", "output": "b"}': "instruction is empty",
}


@pytest.mark.parametrize("line", list(BAD_LINES), ids=lambda line: repr(line[-30:]))
def test_a_bad_line_is_rejected_with_its_number_and_no_good_one_is_lost(line, tmp_path, tokenizer, template):
    path, good = tmp_path / "rows.jsonl", [json.dumps(row).encode() for row in GOOD]
    path.write_bytes(b"\r\n".join([good[0], b"", good[1], line, b"  ", good[2], good[3]]))
    data = read(tokenizer, template, path, bad_rows="skip")
    assert [row.source for row in data.train] == [f"{path}:{n}" for n in (1, 3, 6, 7)]
    assert [bad.where for bad in data.rejected] == [f"{path}:4"]
    assert BAD_LINES[line] in data.rejected[0].reason
    with pytest.raises(UserError) as error:
        read(tokenizer, template, path)
    assert (error.value.where, error.value.exit_code) == (f"{path}:4", 3)
    assert BAD_LINES[line] in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [line for line in BAD_LINES if line.endswith((b"}", b"l", b't"')) and BAD_LINES[line][:3] not in ("not", "mor")],
)
def test_a_bad_element_of_a_json_list_is_rejected_with_the_line_it_starts_on(bad, tmp_path, tokenizer, template):
    path, good = tmp_path / "rows.json", [json.dumps(row, indent=2).encode() for row in GOOD]
    path.write_bytes(b"\xef\xbb\xbf[\n" + good[0] + b"\n,\n\n" + good[1] + b", " + bad + b",\n" + good[2] + b"\n]\n")
    data = read(tokenizer, template, path, bad_rows="skip")
    assert [row.source for row in data.train] == [f"{path}:{n}" for n in (2, 8, 12)]
    assert [bad.where for bad in data.rejected] == [f"{path}:11"]


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("rows.xls", b"x", "a data file ends in .json, .jsonl, .csv, ", ""),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "the file is gzip, not JSON in UTF-8", ""),
        ("rows.json", '[{"a": 1}]'.encode("utf-16"), "the file is UTF-16, not JSON in UTF-8", ""),
        ("rows.jsonl", b"[\n{}\n]", "this is a JSON list, not JSON Lines", ":1"),
        ("rows.json", b'[\n{"a": "\xff"}]', "not UTF-8 at byte 10", ":2"),
        ("rows.json", b'{"a": 1}', "a .json file must be a list of rows: ", ""),
        ("rows.json", b'[\n{"a": 1},\n{"a" 1}]', "not JSON at column 6: Expecting ':' delimiter", ":3"),
        ("rows.json", b'[\n{"a": 1},\n]', "not JSON at column 1: Expecting value", ":3"),
        ("rows.json", b"[\n" + b"[" * 100000, "it is nested too deeply", ":2"),
        ("rows.json", b'[{"a": 1}\n{"a": 1}]', "expected , or ] after a row, got '{'", ":2"),
        ("rows.json", b'[{"instruction": "a", "output": "b"}', "expected , or ] after a row, got 'the end'", ":1"),
        ("rows.json", b"[]\n[]", "there is more after the end of the list", ":2"),
        ("rows.json", b"[]", "there are no rows in it", ""),
        ("rows.json", b"", "there are no rows in it", ""),
        ("rows.jsonl", b"", "there are no rows in it", ""),
        ("rows.jsonl", b"\n\n", "there are no rows in it", ""),
        ("rows.jsonl", b"{}\n{}\n", "none of its rows can be used; 2 bad rows:", ""),
    ],
)
def test_a_file_that_holds_no_rows_is_an_error(tmp_path, tokenizer, template, name, content, what, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^error: {re.escape(f'{tmp_path / name}{line}: {what}')}") as error:
        read(tokenizer, template, tmp_path / name, bad_rows="skip")
    assert error.value.exit_code == 3


def test_json_and_jsonl_of_the_same_rows_are_read_alike_whatever_the_line_ends(tmp_path):
    rows = [
        {"instruction": "a\u2028b\x85c", "output": "x" * 10**6},
        {"instruction": "e" + "\u0301" * 10**5, "output": "y"},
    ]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    for name, content in {
        "a.jsonl": b"\n".join(lines),
        "b.jsonl": b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n",
        "c.json": b"[" + b",\r\n".join(lines) + b"]",
    }.items():
        (tmp_path / name).write_bytes(content)
        found = list(records(tmp_path / name))
        assert [record.value for record in found] == rows
        assert [record.where for record in found] == [f"{tmp_path / name}:{n}" for n in (1, 2)]


def test_hundreds_of_mutated_lines_lose_no_good_line_and_end_in_no_traceback(tmp_path):
    rng = random.Random(0)
    known = [line for line in BAD_LINES if len(line) < 10000]
    for trial in range(20):
        lines, bad, mutated = [], set(), set()
        for number in range(1, 101):
            row = {"messages": [{"role": t.role, "content": t.content} for t in chats(1, 100 * trial + number)[0]]}
            line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()
            if rng.random() < 0.2:
                line = rng.choice(known)
                bad.add(number)
            elif rng.random() < 0.4:
                place, width = rng.randrange(len(line)), rng.choice([0, 1, 5])
                line = (
                    line[:place]
                    + rng.choice([b"", b'"', b"\\", b"}", b"\xff", b"\x00", b"[", b"9"])
                    + line[place + width :]
                )
                mutated.add(number)
            lines.append(line)
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        rejected = set()
        for record in records(path):
            try:
                if record.problem:
                    raise ValueError(record.problem)
                FORMATS[detect(record.value)].turns(record.value)
            except ValueError:
                rejected.add(int(record.where.rpartition(":")[2]))
        assert bad <= rejected <= bad | mutated
        for number in mutated - rejected:  # what is taken must be what a strict reader takes
            assert isinstance(json.loads(lines[number - 1].decode("utf-8")), dict)


def test_a_folder_gives_its_files_of_rows_to_train_on_and_rows_held_out(tmp_path):
    with pytest.raises(UserError, match="no file called train in it, but nothing"):
        find(str(tmp_path), None)
    (tmp_path / "train.jsonl").touch()
    train = [Source(tmp_path / "train.jsonl")]
    assert find(str(tmp_path), None) == (train, [])
    (tmp_path / "dev.json").touch()
    assert find(str(tmp_path), None) == (train, [Source(tmp_path / "dev.json")])
    assert find(str(tmp_path), str(tmp_path / "train.jsonl"))[1] == [Source(tmp_path / "train.jsonl")]
    (tmp_path / "validation.jsonl").touch()
    with pytest.raises(UserError, match="several files could be meant: dev.json, validation.jsonl"):
        find(str(tmp_path), None)
    for nowhere in ("nowhere", "n" * 5000):
        with pytest.raises(UserError, match="no such file or folder") as error:
            find(str(tmp_path / nowhere), None)
        assert error.value.exit_code == 3


@pytest.mark.parametrize("name", ["train.xls", "train.zip", "rows.ods"])
def test_a_kind_of_file_that_is_not_read_is_named_and_never_ignored(tmp_path, name):
    (tmp_path / name).write_text("a,b")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match="a data file ends in .json, .jsonl, .csv") as error:
            list(records(find(str(path), None)[0][0].path))
        assert error.value.exit_code == 3
    (tmp_path / "validation.xls").touch()
    (tmp_path / name).unlink()
    (tmp_path / "train.csv").touch()
    with pytest.raises(UserError, match="old Excel is not read"):  # else other rows would be held out, without a word
        find(str(tmp_path), None)


def test_rows_to_measure_are_the_held_out_ones_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no file called train in it"):
        find_measured(str(tmp_path))
    for name in ("train.jsonl", "dev.json"):  # each is preferred to those before it
        (tmp_path / name).touch()
        assert find_measured(str(tmp_path)) == [Source(tmp_path / name)]
    assert find_measured(str(tmp_path / "train.jsonl")) == [Source(tmp_path / "train.jsonl")]


def test_a_split_holds_out_at_least_one_row_and_leaves_one():
    assert sorted(split(2, 0.01, 0)) == [False, True]
    assert split(1, 0.5, 0).tolist() == [False]
    assert split(3, 0.0, 0).tolist() == [False] * 3
    assert sorted(split(2, 0.99, 0)) == [False, True]
    held_out = split(100, 0.1, 7)
    assert sum(held_out) == 10
    assert split(100, 0.1, 7).tolist() == held_out.tolist() != split(100, 0.1, 8).tolist()


def test_a_share_of_the_rows_to_hold_out_is_refused_where_other_rows_are_held_out(tmp_path, tokenizer, template):
    row = [{"instruction": "a", "output": "b"}]
    train, held_out = (write_jsonl(tmp_path / f"{name}.jsonl", row * 4) for name in ("train", "valid"))
    for path, settings in ((tmp_path, {}), (train, {"validation_path": str(held_out)})):
        with pytest.raises(UserError, match=f"0.1 is of no use: the rows of {held_out} are held out") as error:
            read(tokenizer, template, path, validation_split=0.1, **settings)
        assert (error.value.where, error.value.exit_code) == ("data.validation_split", 2)
        for share in (0.0, Data.validation_split):
            assert read(tokenizer, template, path, validation_split=share, **settings).report.validation.rows == 4


# rows


def test_a_row_trains_the_answer_and_its_end_of_turn(tmp_path, tokenizer, template):
    row = read(tokenizer, template, write_jsonl(tmp_path / "rows.jsonl", GOOD)).train[2]
    prompt = template.prompt([Turn("user", "Count to 2.")])
    assert row.ids[: row.prompt_length] == prompt
    assert tokenizer.decode([i for i, t in zip(row.ids, row.trained, strict=True) if t], False) == "2 3 4<|im_end|>"
    assert row.trained[: row.prompt_length] == [False] * row.prompt_length
    assert row.turns == [Turn("user", "Count to 2."), Turn("assistant", "2 3 4")]


def test_without_mask_prompt_every_token_but_the_first_is_trained(tmp_path, tokenizer, template):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD)
    for row in read(tokenizer, template, path, mask_prompt=False).train:
        assert row.trained == [False] + [True] * (len(row.ids) - 1)
        assert row.prompt_length == 1


def test_the_system_message_of_the_settings_goes_before_rows_that_have_none(tmp_path, tokenizer, template):
    rows = [alpaca(1), alpaca(2) | {"system": "own"}]
    data = read(tokenizer, template, write_jsonl(tmp_path / "rows.jsonl", rows), system="given")
    assert [row.turns[0] for row in data.train] == [Turn("system", "given"), Turn("system", "own")]


def test_rows_without_anything_to_train_are_bad_rows(tmp_path, tokenizer, template):
    untrained = [USER, {"role": "assistant", "content": "a", "train": False}]
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1), untrained, [USER], alpaca(2)])
    data = read(tokenizer, template, path, bad_rows="skip")
    assert [bad.where[-2:] for bad in data.rejected] == [":2", ":3"]
    assert "nothing in it is trained" in data.rejected[0].reason
    with pytest.raises(UserError, match="nothing in it is trained"):
        read(tokenizer, template, path)
    with pytest.raises(UserError, match="no row is left to train on: 2 rejected") as error:
        read(tokenizer, template, write_jsonl(tmp_path / "none.jsonl", [untrained, [USER]]), bad_rows="skip")
    assert error.value.hint == "put the rejected rows right, or take another template"


def test_an_error_names_five_bad_rows_and_counts_the_others(tmp_path, tokenizer, template):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a"}] * 8)
    with pytest.raises(UserError) as error:
        read(tokenizer, template, path)
    told = str(error.value)
    assert all(f"{path}:{n}: output is missing" in told for n in range(1, 6))
    assert f"{path}:6" not in told
    assert "and 3 more" in told
    assert "8 bad rows" in told
    with pytest.raises(UserError, match="hint: 1 bad row to put right, or to leave out"):
        read(tokenizer, template, write_jsonl(tmp_path / "one.jsonl", [{"instruction": "a"}, alpaca(1)]))


def test_what_the_template_refuses_is_a_bad_row(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "llama2"))
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1), [USER, USER, {"role": "assistant", "content": "a"}]])
    data = read(tokenizer, ChatTemplate(tokenizer), path, bad_rows="skip")
    assert len(data.train) == 1
    assert "roles must alternate" in data.rejected[0].reason


def test_what_a_template_says_of_a_row_is_one_line_of_the_report_and_steers_no_terminal(tmp_path):
    folder = write_folder(tmp_path, "chatml")
    refusal = "{% if messages[0].content == 'q' %}{{ raise_exception('a\x1b[31m\nb') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + CHATML)
    path = write_jsonl(tmp_path / "rows.jsonl", [[USER, {"role": "assistant", "content": "a"}], alpaca(1)])
    tokenizer = Tokenizer.load(folder)
    report = read(tokenizer, ChatTemplate(tokenizer), path, bad_rows="skip").report
    assert [note.partition(" (")[2] for note in report.notes] == ["a\ufffd[31m b); the run's rejected.jsonl lists them"]


def test_a_file_without_a_usable_row_says_what_rows_look_like_and_which_keys_came(tmp_path, tokenizer, template):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "respuesta": "b"}] * 6 + [{"txt": "c"}])
    for bad_rows in ("error", "skip"):
        with pytest.raises(UserError) as error:
            read(tokenizer, template, path, bad_rows=bad_rows)
        assert (error.value.where, error.value.exit_code) == (path, 3)
        assert f"7 bad rows:\n{path}:1: output is missing" in error.value.what
        assert '{"instruction": "...", "output": "..."}' in error.value.hint
        assert """to map them: --data.columns '{"user": "instruction", "assistant": "respuesta"}'""" in error.value.hint
        assert "the rows have the keys instruction (6 rows), respuesta (6 rows), txt (1 row)" in error.value.hint
        assert "bad_rows" not in error.value.hint


# length


def test_a_row_of_megabytes_is_a_long_row_like_any_other(tmp_path, tokenizer, template):
    large = {"instruction": "a", "output": "naïve " * 610_000}  # more than a template may write without leave
    path = write_jsonl(tmp_path / "rows.jsonl", [alpaca(1), large, alpaca(2)])
    with pytest.raises(UserError) as error:
        read(tokenizer, template, path)
    assert error.value.exit_code == 3
    assert f"1 row longer than 2,048 tokens: {path}:2 (" in str(error.value)
    data = read(tokenizer, template, path, overlong="drop")  # not one of bad_rows, which are errors
    assert [row.source for row in data.train] == [f"{path}:1", f"{path}:3"]
    assert [bad.where for bad in data.rejected] == [f"{path}:2"]


@pytest.fixture
def long_rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [alpaca(i, words=80 if i % 3 == 1 else 3) for i in range(9)])


def test_rows_that_are_too_long_are_an_error_that_names_them(long_rows, tokenizer, template):
    with pytest.raises(UserError) as error:
        read(tokenizer, template, long_rows, max_length=100)
    lengths = {row.source: len(row.ids) for row in read(tokenizer, template, long_rows).train}
    named = ", ".join(f"{source} ({n})" for source, n in lengths.items() if n > 100)
    assert f"3 rows longer than 100 tokens: {named}" in str(error.value)
    with pytest.raises(UserError, match="longer than 90 tokens"):
        read(tokenizer, template, long_rows, max_positions=90)


def test_rows_that_are_too_long_are_dropped_and_counted(long_rows, tokenizer, template):
    data = read(tokenizer, template, long_rows, max_length=100, overlong="drop")
    assert [int(row.source[-1]) for row in data.train] == [1, 3, 4, 6, 7, 9]
    assert len(data.report.dropped) == 3
    whole = {row.source: len(row.ids) for row in read(tokenizer, template, long_rows).train}
    named = ", ".join(f"{where} ({n} tokens, of at most 100)" for where, n in whole.items() if n > 100)
    assert f"warning: 3 rows longer than 100 tokens, left out: {named}; the run's" in str(data.report)
    assert [bad.where for bad in data.rejected] == [where for where, n in whole.items() if n > 100]
    for seed in range(9):  # in the file's order, though a split has taken them apart
        data = read(tokenizer, template, long_rows, max_length=100, overlong="drop", validation_split=0.5, seed=seed)
        assert [bad.where for bad in data.rejected] == [where for where, n in whole.items() if n > 100]
    with pytest.raises(UserError, match="no row is left to train on: 0 rejected, 9 longer than 10 tokens") as error:
        read(tokenizer, template, long_rows, max_length=10, overlong="drop")
    assert error.value.hint == "raise data.max_length, or say data.overlong split"


@pytest.mark.parametrize("length", [17, 40, 64, 100])
def test_rows_that_are_too_long_are_split_without_losing_a_label(long_rows, tokenizer, template, length):
    whole = read(tokenizer, template, long_rows).train
    data = read(tokenizer, template, long_rows, max_length=length, overlong="split")
    for row in whole:
        pieces = [piece for piece in data.train if piece.source == row.source]
        labels = [i for piece in pieces for i, t in zip(piece.ids, piece.trained, strict=True) if t]
        assert labels == [i for i, t in zip(row.ids, row.trained, strict=True) if t]
        assert sum(piece.ended for piece in pieces) == 1
        assert all(len(piece.ids) <= length and any(piece.trained) and not piece.trained[0] for piece in pieces)
        assert all(piece.trained.index(True) == piece.prompt_length for piece in pieces)
    assert data.report.split_rows == sum(len(row.ids) > length for row in whole)
    assert data.report.split_pieces == len(data.train) - sum(len(row.ids) <= length for row in whole)
    pieces = sum(-(-(len(row.ids) - 1) // (length - 1)) for row in whole if len(row.ids) > length)
    assert data.report.empty_pieces == pieces - data.report.split_pieces


# report


def test_the_report_counts_what_there_is(tmp_path, tokenizer, template):
    rows = [alpaca(i) for i in range(20)] + [alpaca(3)] * 5
    data = read(tokenizer, template, write_jsonl(tmp_path / "rows.jsonl", rows), validation_split=0.4, seed=1)
    texts = {tuple(row.ids) for row in data.train}
    assert data.report.duplicates == sum(tuple(row.ids) in texts for row in data.validation) > 0
    counts = data.report.train
    assert counts.rows == len(data.train) == 15
    assert counts.ended == 15
    assert counts.tokens == sum(len(row.ids) for row in data.train)
    assert counts.trained == sum(sum(row.trained) for row in data.train)
    told = str(data.report)
    assert f"15 rows, {counts.tokens:,} tokens, {counts.trained} trained ({counts.trained / counts.tokens:.1%})" in told
    assert "the rows to train on hold 1 held-out row\n" in f"{told}\n"
    assert "end-of-turn token trained in 100.0% of the rows" in told


def test_a_token_across_the_end_of_a_prompt_is_trained_and_counted(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{{ m.content }}"
        "{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}{{ 'A: ' if add_generation_prompt }}"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "Paris."}] * 2)
    data = read(tokenizer, ChatTemplate(tokenizer), path)
    assert data.report.straddling == 2
    trained = [i for i, t in zip(data.train[0].ids, data.train[0].trained, strict=True) if t]
    assert tokenizer.decode(trained, False) == " Paris.<|im_end|>"


def test_a_shown_row_marks_what_is_trained_and_steers_no_terminal(tmp_path, tokenizer, template):
    row = {"instruction": "a\x1b[31mb", "output": "yes, 日本 🙂"}
    row = read(tokenizer, template, write_jsonl(tmp_path / "rows.jsonl", [row])).train[0]
    shown = show(row, tokenizer, color=False)
    assert shown.endswith("<|im_start|>assistant\n[yes, 日本 🙂<|im_end|>]\n")
    assert "a\\x1b[31mb" in shown
    assert "\x1b[32myes, 日本 🙂\x1b[7m<|im_end|>\x1b[0m\x1b[32m\x1b[0m\n" in show(row, tokenizer, color=True)


@pytest.mark.parametrize("style", list(STYLES))
def test_every_row_of_every_style_trains_its_end_of_turn(tmp_path, style):
    tokenizer = Tokenizer.load(write_folder(tmp_path, style))
    found = [[{"role": t.role, "content": t.content} for t in turns] for turns in chats(60, 5, system=False)]
    data = read(tokenizer, ChatTemplate(tokenizer), write_jsonl(tmp_path / "rows.jsonl", found))
    assert data.report.train.ended == data.report.train.rows == 60
    assert data.report.straddling == 0
    assert data.report.unlike == []
    template = ChatTemplate(tokenizer)  # another one: what is asked later is what was learned
    for row in data.train:
        asked = row.turns[: [turn.role for turn in row.turns].index("assistant")]
        assert template.prompt(asked) == row.ids[: row.prompt_length]
