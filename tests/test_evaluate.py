"""litpeft evaluate: a run beside its base, on rows with known answers."""

import json

from conftest import finetune, write_rows

from litpeft.cli import main


def test_a_run_that_learnt_its_rows_scores_all_and_its_base_none(tiny_folder, tmp_path, capsys) -> None:
    unfreeze = '["head.weight", "embed.weight"]'
    learn = "--train.epochs", "60", "--train.lr", "1e-2", "--method.unfreeze", unfreeze, "--validation.interval", "1000"
    run, out = finetune(tiny_folder, tmp_path, *learn), tmp_path / "answers.jsonl"
    capsys.readouterr()
    rows = write_rows(tmp_path) / "train.jsonl"
    argv = ["--precision", "32-true", "--max_new_tokens", "8", "--batch_size", "4", "--output", str(out)]
    main(["evaluate", str(run), str(rows), *argv])
    said = capsys.readouterr().out
    assert "0/6 (0.0%)" in said
    assert "6/6 (100.0%)" in said
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["finetuned"]["answer"] for r in records] == [r["expected"] for r in records]
    assert not any(r["base"]["exact"] for r in records)
    main(["evaluate", str(tiny_folder), str(rows), *argv[:6]])
    alone = capsys.readouterr().out
    both, one = (text.split("loss, nats per token")[1].split() for text in (said, alone))
    assert both[0] == one[0]  # the base inside the run is the base alone
