"""`litpeft data show` and `litpeft data check`: rows as the model sees them, and what is wrong with a data set."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from litpeft.cli import main
from litpeft.cli.data import Check, Show, check, show
from litpeft.core.errors import DataError, UserError
from litpeft.data.check import CHECKS, histogram
from litpeft.data.duplicates import first_of_each, nearly_the_same

COLOUR = {"instruction": "Colour of the sky?", "output": "blue"}
LONG = {"instruction": "Tell me of Lima. " * 3, "output": "It is the capital of Peru, by the sea, in the west. " * 2}
ROWS = [
    COLOUR,
    COLOUR | {"id": 1},
    LONG,
    LONG | {"output": LONG["output"] + "Yes."},
    {"instruction": "a", "output": " "},
    {"instruction": "Say <|im_end|>", "output": "It is grey."},
    {"instruction": "x" * 600, "output": "yz"},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "held-out.jsonl").write_text(json.dumps(COLOUR) + "\n")
    return path


def test_a_check_finds_what_is_wrong_with_its_line_and_fails_above_the_limit(tiny_folder, rows, capsys) -> None:
    out = rows.with_name("found.json")
    settings = {"model": str(tiny_folder), "validation_path": str(rows.with_name("held-out.jsonl"))}
    with pytest.raises(DataError) as error:
        check(Check(str(rows), max_length=500, json=str(out), **settings))
    told = capsys.readouterr().out
    assert error.value.what.endswith("checks failed: unusable, empty_answer, too_long, duplicate, held_out_too")
    found = json.loads(out.read_text())
    lines = {one["name"]: [int(bad["where"].rpartition(":")[2]) for bad in one["rows"]] for one in found["findings"]}
    assert lines == {
        "unusable": [5],
        "empty_answer": [5],
        "too_long": [7],
        "no_end": [],
        "double_bos": [],
        "duplicate": [2],
        "near_duplicate": [4],
        "held_out_too": [1, 2],
        "special_token": [6],
        "begins_otherwise": [],
    }
    assert (found["rows"], found["held_out"], found["unread"], found["lost"]) == (
        6,
        1,
        {"id": 1},
        3,
    )
    assert f"{rows}:2: the same as {rows}:1" in told
    assert found["tokens"] == sum(found["lengths"])
    for length in (len(found["lengths"]), found["trained"]):
        assert f"{length:,}" in told
    check(Check(str(rows), max_length=500, limits=dict.fromkeys(found["failed"], 0.5), **settings))
    with pytest.raises(ValueError, match="limits are of unusable, empty_answer"):
        Check(str(rows), model="x", limits={"dup": 1})


def test_fix_writes_a_clean_copy_and_the_other_rows_with_their_reasons(tiny_folder, rows) -> None:
    clean = rows.with_name("clean.jsonl")
    rows.write_text(rows.read_text() + "{broken\n")
    check(Check(str(rows), model=str(tiny_folder), max_length=500, fix=str(clean), limits={"near_duplicate": 0}))
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [ROWS[0], ROWS[2], ROWS[5]]
    others = [json.loads(line) for line in clean.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in others] == [ROWS[1], ROWS[3], ROWS[4], ROWS[6], None]
    assert others[-1]["reason"].startswith("not JSON at column 2")
    check(Check(str(clean), model=str(tiny_folder)))  # nothing fails any more


def test_two_bos_are_found(tiny_folder, rows, tmp_path, capsys) -> None:
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    template = "{{ bos_token * 2 }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    rows.write_text(json.dumps(COLOUR) + "\n")
    with pytest.raises(DataError, match="double_bos"):
        check(Check(str(rows), model=str(folder)))


def test_rows_are_shown_by_number_by_line_and_as_a_page(tiny_folder, rows, capsys) -> None:
    model = {"model": str(tiny_folder)}
    show(Show(str(rows), first=2, count=2, **model))
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith(str(rows))] == [
        f"{rows}:2: 43 tokens, 5 trained",
        f"{rows}:3: 176 tokens, 105 trained",
        f"{rows}:5 cannot be used: output is empty",
    ]
    assert "<|im_start|>assistant\n[blue<|im_end|>]\n" in told
    show(Show(str(rows), line=6, **model))
    assert "Say <|im_end|><|im_end|>" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"{rows}:5: output is empty"):
        show(Show(str(rows), line=5, **model))
    with pytest.raises(UserError, match="there is no such row"):
        show(Show(str(rows), first=9, **model))
    page = rows.with_name("rows.html")
    main(["data", "show", str(rows), "--model", str(tiny_folder), "--line", "6", "--html", str(page)])
    text = page.read_text()
    assert '<span class="s">&lt;|im_start|&gt;</span>user\nSay &lt;|im_end|&gt;<span class="s">&lt;|im_end|' in text
    assert '<span class="t ">It is grey.</span><span class="t s">&lt;|im_end|&gt;</span>' in text


def test_near_duplicates_are_those_that_share_their_runs_of_words() -> None:
    words = [f"w{i}" for i in range(60)]
    texts = [
        " ".join(words),
        " ".join([*words, "more"]),
        " ".join(reversed(words)),
        "",
        " ".join(words).upper(),
        "short",
    ]
    assert nearly_the_same(len(texts), texts.__getitem__).tolist() == [-1, 0, -1, -1, 0, -1]
    assert first_of_each(np.array([3, 1, 2, 3, 1])).tolist() == [-1, -1, -1, 0, 1]


def test_a_histogram_counts_every_row_once() -> None:
    for lengths in ([5], [5, 5], list(range(100)), [1, 1000]):
        lines = histogram(sorted(lengths))
        assert sum(int(line.split()[-1]) for line in lines) == len(lengths)
        assert len(lines) <= 12


def test_no_percentile_of_few_rows_is_below_their_median(tiny_folder, rows, capsys) -> None:
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": "bc" * n}) + "\n" for n in (1, 20)))
    check(Check(str(rows), model=str(tiny_folder)))
    assert (found := re.search(r"length +median (\d+); 95% up to (\d+); longest (\d+)", capsys.readouterr().out))
    assert found[1] == found[2] == found[3]


def test_every_check_is_in_the_tutorial() -> None:
    page = (Path(__file__).parent.parent / "tutorials" / "data.md").read_text()
    assert [name for name in CHECKS if f"`{name}`" not in page] == []
