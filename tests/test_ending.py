"""What a run measures at its end: the losses of rows and of neutral text, without and with what was learned."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finetune
from short_runs import cut, resume, train
from test_report import FACTS, HOSTILE, outline
from test_row_store import written
from test_train import some_rows

from litpeft.cli import main
from litpeft.data.formats.turn import Turn
from litpeft.data.neutral import forgetting, neutral_rows
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.load import load_model
from litpeft.model.build import build
from litpeft.model.objective import mean_loss, row_losses
from litpeft.train.ending import FEWEST_ROWS, FEWEST_TEXTS, affordable, chosen
from litpeft.train.report import markdown, summary_lines
from litpeft.train.row_losses import RowLoss, far_above, told_apart

CPU = torch.device("cpu")
Line = dict[str, str]


def read_rows(run: Path) -> list[Line]:
    with open(run / "rows.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_loss_of_each_row_is_what_it_has_alone(tiny_folder) -> None:
    model, rows = build(tiny_folder, torch.float64), some_rows(24)
    alone = [mean_loss(model, [row], 2048, CPU) for row in rows]
    assert row_losses(model, rows, CPU) == pytest.approx(alone, abs=1e-12)
    assert max(len(row.ids) for row in rows) < 512 < sum(len(row.ids) for row in rows)


@pytest.mark.parametrize(
    ("method", "argv"),
    [
        ("prompt", ()),
        ("pissa", ()),
        ("full", ()),
        ("lora", ("--method.unfreeze", "*norm*", "--data.packing", "false")),
    ],
)
def test_before_is_the_base_and_after_the_run_as_other_commands_load_them(
    tiny_folder, tmp_path, method: str, argv: tuple[str, ...]
) -> None:
    learn = "--train.epochs", "3", "--train.lr", "1e-2", "--base.precision", "64-true", "--ending.rows", "9"
    run = finetune(tiny_folder, tmp_path, *learn, *argv, method=method)
    lines = {int(line["line"]): line for line in read_rows(run)}
    tokenizer = Tokenizer.load(tiny_folder)
    template = ChatTemplate(tokenizer)
    rows = load_dataset(Data(lines[1]["file"], validation_split=0.0), tokenizer, template, 512).train
    texts = neutral_rows("auto", template, 512, "")[:FEWEST_TEXTS]
    for at, (folder, key) in enumerate(((tiny_folder, "loss_before"), (run, "loss_after"))):
        model = load_model(str(folder), precision="64-true").model
        want = {n: mean_loss(model, [row], 2048, CPU) for n, row in enumerate(rows, 1)}
        assert {n: float(line[key]) for n, line in lines.items()} == pytest.approx(want, rel=1e-5)
        neutral = json.loads((run / "report.json").read_text())["neutral"]
        assert neutral[at] == pytest.approx(mean_loss(model, texts, 2048, CPU), rel=1e-9)
    assert sum(abs(float(line["loss_after"]) - float(line["loss_before"])) for line in lines.values()) > 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_killed_and_resumed_tells_the_same_of_its_rows(tiny_folder, tmp_path, method: str) -> None:
    whole = train(tiny_folder, tmp_path / "whole", method=method)
    part = cut(whole, 2, tmp_path / "part")
    (part / "rows.csv").unlink()
    (part / "rows.csv.part").write_text("file,li")
    resume(tiny_folder, part, method=method)
    assert (part / "rows.csv").read_bytes() == (whole / "rows.csv").read_bytes()
    ends = [json.loads((run / "report.json").read_text()) for run in (part, whole)]
    for key in ("rows", "neutral"):
        assert ends[0][key] == ends[1][key] is not None
    assert not (part / "rows.csv.part").exists()


def test_nothing_of_it_changes_what_is_learned_and_each_part_can_be_left_out(tiny_folder, tmp_path, capsys) -> None:
    told = finetune(tiny_folder, tmp_path, "--ending.rows", "4", out="told", method="full")
    silent = finetune(
        tiny_folder, tmp_path, "--ending.rows", "0", "--ending.neutral", "none", out="silent", method="full"
    )
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (told, silent)]
    assert weights[0] == weights[1]
    assert len(read_rows(told)) == 4
    assert not (silent / "rows.csv").exists()
    reports = [(run / "report.md").read_text() for run in (told, silent)]
    assert ["## Rows" in text for text in reports] == ["on neutral text" in text for text in reports] == [True, False]
    assert capsys.readouterr().out.count("on neutral text the loss went from") == 1


def test_a_text_of_ones_own_is_taken_and_another_file_refused(tiny_folder, tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("The cat sat.\n\nThe dog ran away over the hill.\n")
    run = finetune(tiny_folder, tmp_path, "--ending.neutral", str(tmp_path / "mine.txt"))
    assert json.loads((run / "report.json").read_text())["neutral"][0] == pytest.approx(5.7, abs=0.5)
    for name, says in (("rows.jsonl", "ending.neutral: must be auto, none, or a file of plain"), ("no.txt", "no such")):
        with pytest.raises(SystemExit):
            finetune(tiny_folder, tmp_path, "--ending.neutral", str(tmp_path / name), out="other")
        assert says in capsys.readouterr().err


def test_a_wrong_answer_among_rows_of_a_kind_is_told(tmp_path, tiny_folder, capsys) -> None:
    rows = [{"instruction": f"Is {n} even?", "output": "no" if n % 2 else "yes"} for n in range(10, 40)]
    rows[17]["output"] = "QZJXKV"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = "--data.path", str(tmp_path / "rows.jsonl"), "--data.validation_split", "0", "--train.batch_size", "8"
    run = finetune(
        tiny_folder, tmp_path, *argv, "--ending.rows", "100", "--train.epochs", "6", "--train.lr", "3e-3", method="full"
    )
    assert [(line["line"], line["note"]) for line in read_rows(run)][0] == ("18", "far above the others"), read_rows(
        run
    )
    assert "1 row far above the others: " in capsys.readouterr().out
    assert "QZJXKV" in (run / "report.md").read_text()


def test_rows_stand_out_only_among_enough_others() -> None:
    many = [0.1 + 0.01 * (n % 7) for n in range(40)]
    assert far_above([*many, 3.0]) < 3.0
    assert far_above([*many[:10], 3.0]) == float("inf")
    assert far_above(many) == 0.5
    rows = [RowLoss(f"r:{n}", 9, 4, 0.02 * n, loss, "", "") for n, loss in enumerate([*many, 3.0])]
    found = told_apart(rows, 900)
    assert ([row.source for row in found.suspects], found.suspect_count) == (["r:40"], 1)
    assert ([row.source for row in found.known], found.known_count) == (["r:0", "r:1", "r:2"], 5)


def test_the_rows_are_as_many_as_the_run_can_afford_and_always_the_same() -> None:
    rows = written([[replace(row, turns=[Turn("assistant", "")])] for row in some_rows(24)])
    tokens = int(rows.column("tokens").sum())
    some = chosen(rows, 0, tokens / 2, "auto")
    assert FEWEST_ROWS < len(some) < 24
    assert sum(len(rows[at].ids) for at in some) <= tokens / 2
    assert chosen(rows, 0, 3 * tokens, "auto")[: len(some)] == some != chosen(rows, 1, tokens / 2, "auto")
    assert sorted(chosen(rows.where(np.tile(np.arange(24), 2)), 0, 0, 99)) == list(range(24))
    assert len(chosen(rows, 0, 0, "auto")) == FEWEST_ROWS
    assert affordable(1000, 0.1) == pytest.approx(100)  # a token is read twice here, and as twice in training


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (3.1, 3.14, "from 3.10 to 3.14 nats per token: it forgot little"),
        (3.1, 3.1, "it forgot nothing"),
        (3.1, 3.5, "it forgot some"),
        (3.1, 5.0, "it forgot much: lower train.lr"),
    ],
)
def test_what_was_forgotten_is_a_plain_sentence(before: float, after: float, says: str) -> None:
    facts = replace(FACTS, neutral=(before, after))
    assert says in forgetting(before, after)
    assert any(says in line for line in summary_lines(facts))
    assert says in markdown(facts, None)


def test_rows_of_any_text_leave_the_report_whole() -> None:
    row = RowLoss(f"{HOSTILE}:3", 9, 4, 0.01, 2.0, HOSTILE, HOSTILE)
    facts = replace(FACTS, rows=told_apart([row] * 30 + [replace(row, after=9.0)], 99))
    seen = [text for kind, text in outline(markdown(facts, None)) if kind == "heading"]
    assert "Rows" in seen
    assert len(seen) == len([text for kind, text in outline(markdown(FACTS, None)) if kind == "heading"]) + 1


def test_evaluate_reads_a_neutral_text_too(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.lr", "1e-2")
    capsys.readouterr()
    main(["evaluate", str(run), str(tmp_path / "data"), "--max_new_tokens", "2", "--neutral", "auto"])
    said = capsys.readouterr().out
    assert "neutral text, nats" in said
    assert "on neutral text the loss went from" in said
