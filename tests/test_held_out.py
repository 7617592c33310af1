"""`merge` says what rounding costs: the loss of the run and of what it writes, on rows that the run held out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, finetune, make_folder
from llama_cpp import write_bpe

from litpeft.cli import main
from litpeft.data.settings import Data
from litpeft.data.tokenise import load_dataset
from litpeft.exchange import held_out
from litpeft.exchange.held_out import HeldOut, Unknown
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.model.objective import mean_loss

LINE = re.compile(
    r"loss on 2 held-out rows: ([\d.]+) nats per token by the run, ([\d.]+) by the files in (\w+)\n"
    r"  so rounding costs ([+-][\d.]+): (.*)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of lora on a base in bfloat16, with two held-out rows in a file. Tests must not change it."""
    folder = tmp_path_factory.mktemp("held-out")
    base = write_bpe(make_folder(folder / "base", dtype="bfloat16"))
    return finetune(base, folder, "--train.epochs", "3", "--train.lr", "1e-2")


@pytest.mark.parametrize("way", ["bfloat16", "q8_0"])
def test_the_losses_are_those_of_the_run_and_of_what_is_written(way: str, run, tmp_path, capsys) -> None:
    argv = ["merge", str(run)] if way == "bfloat16" else ["convert", str(run), "--to", "gguf", "--type", way]
    main([*argv, "--out", str(tmp_path / "out")])
    found = LINE.search(said := capsys.readouterr().out)
    assert found, said
    if way != "bfloat16":
        main(["convert", str(tmp_path / "out" / "model.gguf"), str(tmp_path / "read"), "--dtype", "float32"])
    written = tmp_path / ("out" if way == "bfloat16" else "read")
    loaded = [load_model(str(path), precision="32-true") for path in (run, written)]
    rows = load_dataset(Data(str(run.parent / "data")), loaded[0].tokenizer, loaded[0].template, 512).validation
    losses = [mean_loss(one.model, rows, 2048, torch.device("cpu")) for one in loaded]
    assert [float(found[1]), float(found[2])] == pytest.approx(losses, abs=6e-5)
    assert float(found[4]) == pytest.approx(losses[1] - losses[0], abs=6e-5)
    assert found[3] == way


def test_nothing_is_said_where_nothing_is_rounded_and_a_cost_names_what_to_do(run, tmp_path, capsys) -> None:
    main(["merge", str(run), "--dtype", "float32", "--out", str(tmp_path / "out")])
    assert "rounding costs" not in capsys.readouterr().out
    words = {
        1.0001: "+0.0001: answers are as good",
        0.99999: "+0.0000: answers are as good",
        1.004: "+0.0040: little: compare answers with `litpeft evaluate out ROWS`, or --dtype float32 has none of it",
        1.2: "+0.2000: a part of what was learned is lost: --dtype float32 keeps it",
    }
    for after, text in words.items():
        assert text in "\n".join(HeldOut([], 0).lines(1.0, after, "bfloat16", "--dtype float32", Path("out")))


def rows_of(run: Path) -> HeldOut:
    found = find_run(run)
    return HeldOut.of(found, *found.tokenizer_and_template(found.base_folder()), 512, 10**6)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("no settings", "there is no run.yaml beside the result"),
        ("damaged settings", "run.yaml cannot be read: data.path must be"),
        ("no rows", "its rows cannot be read: there is no such file or folder"),
        ("standard input", "its rows came from standard input"),
        ("nothing held out", "the run held out no row"),
        ("large files", "which is more than is read for this"),
    ],
)
def test_it_says_why_there_are_no_rows(case: str, why: str, run, tmp_path, monkeypatch) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    settings = copy / "run.yaml"
    place, said = f"path: {run.parent / 'data'}\n", settings.read_text()
    assert place in said
    if case == "no settings":
        settings.unlink()
    elif case == "large files":
        monkeypatch.setattr(held_out, "LARGEST", 10)
    else:
        train = run.parent / "data" / "train.jsonl"
        others = {"damaged settings": "path: 3\n", "no rows": "path: nowhere\n", "standard input": "path: '-'\n"}
        said = said.replace(place, others.get(case, f"path: {train}\n"))
        settings.write_text(said.replace("validation_split: 0.05", "validation_split: 0.0"))
    with pytest.raises(Unknown, match=why):
        rows_of(copy)


def test_rows_of_a_split_are_those_that_were_held_out_and_few_are_read(run, tmp_path) -> None:
    rows = [{"instruction": f"Colour of {thing}?", "output": colour} for thing, colour in COLOURS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 8 * rows))
    copy = shutil.copytree(run, tmp_path / "run")
    settings = copy / "run.yaml"
    said = settings.read_text().replace(f"path: {run.parent / 'data'}\n", f"path: {tmp_path / 'rows.jsonl'}\n")
    settings.write_text(said.replace("validation_split: 0.05", "validation_split: 0.5"))
    found = rows_of(copy)
    loaded = load_model(str(run))
    data = Data(str(tmp_path / "rows.jsonl"), validation_split=0.5)
    assert found.rows == list(load_dataset(data, loaded.tokenizer, loaded.template, 512).validation)
    assert found.total == 24
    assert "loss on 24 held-out rows: " in found.lines(1.0, 1.0, "bfloat16", "", copy)[0]
    few = HeldOut.of(find_run(copy), loaded.tokenizer, loaded.template, 512, 10**12)
    assert sum(len(row.ids) for row in few.rows) <= 256
    assert few.rows == found.rows[: len(few.rows)]
    assert f"loss on the first {len(few.rows)} of 24 held-out rows: " in few.lines(1.0, 1.0, "", "", copy)[0]
