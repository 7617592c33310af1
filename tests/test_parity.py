"""`litpeft data parity`: ids as trained, as transformers renders them from the exported folder, and as generated."""

import json
import sys

import pytest
import yaml
from chat_samples import CHATML
from conftest import finetune, make_folder
from test_thinking import TEXT, TWO, chat, folders  # noqa: F401

from litpeft.cli import main

ROWS = [chat("What is 1+1?", "2"), chat("a", "b", "c", "d"), {"text": "plain"}]


def config(folder, tmp_path, *rows, **data):
    """Returns a YAML file of `litpeft finetune` on these rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {"base": {"dir": str(folder)}, "data": {"path": str(tmp_path / "rows.jsonl"), **data}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said))
    return str(tmp_path / "run.yaml")


def differs(capsys, *argv):
    """Returns what the command prints of rows that differ."""
    with pytest.raises(SystemExit, match="3"):
        main(["data", "parity", *argv])
    return capsys.readouterr().out


def test_rows_that_are_everywhere_the_same(folders, tmp_path, capsys):  # noqa: F811
    for name, rows, more in (
        ("unknown", ROWS, {}),
        ("unknown", ROWS, {"system": "Be brief."}),
        ("last", [TEXT, *ROWS], {"template_options": {"enable_thinking": True}}),
        ("last", [chat("a", "b") | {"enable_thinking": False}, TEXT], {"system": "Be brief."}),
        ("last", [TWO], {"thinking": "keep"}),
        ("last", [TWO], {"thinking": "drop"}),
        ("never", [TWO, TEXT], {"thinking": "keep"}),
    ):
        main(["data", "parity", config(folders[name], tmp_path, *rows, **more), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["differences"] == []
        assert found["rows"] == {"keep": 2 * len([row for row in rows if row is TWO]) + (TEXT in rows)}.get(
            more.get("thinking"), len(rows) - (rows[-1] is ROWS[-1])
        )
        assert found["plain"] == (rows[-1] is ROWS[-1])


def test_a_prompt_that_is_not_how_the_row_begins_is_shown_token_by_token(folders, tmp_path, capsys):  # noqa: F811
    said = differs(capsys, config(folders["never"], tmp_path, ROWS[0]))
    assert "exported    1 equal" in said
    assert "generated   0 equal, 1 not" in said
    line = next(line for line in said.splitlines() if "rows.jsonl:1: generated differs at token " in line)
    at = int(line.rpartition(" ")[2])
    trained, generated = (line.split() for line in said.splitlines()[-2:])
    assert (trained[0], generated[0]) == ("trained", "generated")
    assert "'2'" in trained
    assert at > 5
    assert trained[:7] == ["trained", *generated[1:7]]  # what comes before is the same


def test_an_exported_folder_with_another_template_is_found(tmp_path, capsys):
    run = finetune(make_folder(tmp_path / "base"), tmp_path, "--train.max_steps", "1", "--train.lr", "0.01")
    main(["merge", str(run), "--no_verify"])
    capsys.readouterr()
    main(["data", "parity", str(run)])
    said = capsys.readouterr().out
    assert f"exported    6 equal: by {run / 'merged'} in transformers" in said
    (run / "merged" / "chat_template.jinja").write_text(CHATML)  # with a system message of its own
    said = differs(capsys, str(run), "--rows", "2")
    assert "exported    0 equal, 2 not" in said
    assert "generated   2 equal: by prompt and answer" in said
    assert "exported differs at token 2" in said
    (run / "merged" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="4"):
        main(["data", "parity", str(run)])
    assert "the folder has no chat template for other programs" in capsys.readouterr().err


def test_a_special_token_that_a_row_spells_is_named_as_the_reason(folders, tmp_path, capsys):  # noqa: F811
    said = differs(capsys, config(folders["unknown"], tmp_path, chat("what is <|im_end|>?", "a token")))
    assert ": the row spells <|im_end|>, which is plain text in training" in said
    assert "generated   1 equal" in said


def test_what_cannot_be_compared_is_told(folders, tiny_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    path = config(folders["unknown"], tmp_path, ROWS[0])

    def told(*argv):
        with pytest.raises(SystemExit):
            main(["data", "parity", *argv])
        return capsys.readouterr().err

    assert "neither a run with its run.yaml nor a YAML file" in told(str(tiny_folder))
    assert "there is no conversation to compare" in told(config(folders["unknown"], tmp_path, ROWS[2]))
    (tmp_path / "no.yaml").write_text("train: {}")
    assert "it has no group `data`" in told(str(tmp_path / "no.yaml"))
    (tmp_path / "no.yaml").write_text("data: {paht: x}")
    assert "data: " in told(str(tmp_path / "no.yaml"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "hint: pip install transformers" in told(path)
