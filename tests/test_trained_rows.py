"""A run's own data.columns and data.format are taken over by the commands that read rows for it."""

import json
from pathlib import Path

import pytest
from conftest import finetune

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.exchange.run import find_run
from litpeft.exchange.trained_rows import shape_of
from litpeft.generate.settings import Evaluate

COLUMNS = {"user": "Q: {query}", "assistant": "reply"}
TOLD = 'columns {"user": "Q: {query}", "assistant": "reply"}, as in the training of '


def rows(path: Path, *values: dict) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    learned = rows(folder / "rows.jsonl", *({"query": f"colour {n}?", "reply": "blue", "id": n} for n in range(4)))
    mapping = json.dumps(COLUMNS)
    return finetune(tiny_folder, folder, "--data.path", learned, "--data.columns", mapping, "--train.max_steps", "1")


def test_evaluate_reads_rows_as_the_run_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held_out = rows(tmp_path / "held.jsonl", {"query": "sky?", "reply": "blue"})
    main(["evaluate", str(run), held_out, "--compare_base", "false", "--max_new_tokens", "1"])
    out, err = capsys.readouterr()
    assert f"{TOLD}{run}\n" in err
    assert "asked      Q: sky?\nexpected   blue" in out


def test_generate_reads_prompts_as_the_run_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = rows(tmp_path / "asked.jsonl", {"query": "sky?"})
    main(["generate", str(run), "--input", asked, "--sampling.max_new_tokens", "1"])
    out, err = capsys.readouterr()
    assert f"{TOLD}{run}\n" in err
    assert json.loads(out)["query"] == "sky?"


def test_data_show_and_check_read_rows_as_the_run_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shown = rows(tmp_path / "shown.jsonl", {"query": "sky?", "reply": "blue"})
    main(["data", "show", shown, "--model", str(run)])
    out, err = capsys.readouterr()
    assert f"{TOLD}{run}\n" in err
    assert "Q: sky?" in out
    main(["data", "check", shown, "--model", str(run)])
    assert "format      columns (1 row)" in capsys.readouterr().out


def test_what_the_command_says_comes_first_and_rows_of_another_shape_are_read_by_their_keys(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = rows(tmp_path / "other.jsonl", {"instruction": "sky?", "output": "blue"})
    main(["data", "show", other, "--model", str(run)])
    out, err = capsys.readouterr()
    assert f"the training of {run} had columns" in err
    assert "these rows have other keys, so it is not taken over" in err
    assert "sky?" in out
    both = rows(tmp_path / "both.jsonl", {"query": "sky?", "reply": "blue", "title": "A poem"})
    main(["data", "show", both, "--model", str(run), "--columns", '{"user": "title", "assistant": "reply"}'])
    out, err = capsys.readouterr()
    assert (err, "A poem" in out, "sky?" in out) == ("", True, False)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"format": "question_answer"}, {"format": "question_answer", "columns": None}),
        ({"format": "alpaca"}, {"format": "auto", "columns": None}),  # these rows have other keys
        ({"columns": None}, {"format": "auto", "columns": None}),
        (None, {"format": "auto", "columns": None}),
    ],
)
def test_a_format_is_taken_over_if_the_rows_are_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict | None, wanted: dict
) -> None:
    from litpeft.data.sources import find

    found = find_run(run)
    place = tmp_path / "final"
    place.symlink_to(found.folder)
    found.folder = place
    if data is not None:
        (tmp_path / "run.yaml").write_text(json.dumps({"data": data}))
    path = rows(tmp_path / "rows.jsonl", {"question": "a", "answer": "b", "prompt": "c"})
    assert shape_of(Evaluate(str(run), path), found, find(path, None)[0]) == wanted
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"columns": {"me": "you"}}}))
    with pytest.raises(ModelError, match=r"run\.yaml: data\.columns maps system, user"):
        shape_of(Evaluate(str(run), path), found, find(path, None)[0])
