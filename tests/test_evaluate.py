"""litpeft evaluate: a run beside its base, on rows with known answers."""

import json
import re
import shutil

import pytest
from conftest import finetune, write_rows

from litpeft.cli import main
from litpeft.core.errors import UserError
from litpeft.generate.chat import chat
from litpeft.generate.engine import generate
from litpeft.generate.evaluate import evaluate, measure
from litpeft.generate.settings import Chat, Evaluate, Generate, Sampling


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


def test_a_base_is_refused_where_nothing_would_read_it(tiny_folder, tmp_path, capsys) -> None:
    run, moved = finetune(tiny_folder, tmp_path, method="full"), shutil.copytree(tiny_folder, tmp_path / "moved")
    rows = write_rows(tmp_path) / "train.jsonl"
    for model in map(str, (run, tiny_folder)):
        for command, settings in (
            (generate, Generate(model, "a", base=str(moved))),
            (chat, Chat(model, base=str(moved))),
            (evaluate, Evaluate(model, str(rows), base=str(moved), compare_base=False)),
        ):
            with pytest.raises(UserError, match="base is for a run with a delta") as error:
                command(settings)
            assert (error.value.where, error.value.exit_code) == ("base", 2)
    shutil.move(tiny_folder, hidden := tmp_path / "hidden")
    try:
        evaluate(Evaluate(str(run), str(rows), base=str(moved), max_rows=1, max_new_tokens=1))
    finally:
        shutil.move(hidden, tiny_folder)
    assert re.search("1 row +base +finetuned", capsys.readouterr().out)


def test_the_base_of_a_full_run_is_held_as_its_result_is(tiny_folder, tmp_path, capsys) -> None:
    run, rows = finetune(tiny_folder, tmp_path, method="full"), str(write_rows(tmp_path) / "train.jsonl")
    capsys.readouterr()
    for model in (run, tiny_folder):
        evaluate(Evaluate(str(model), rows, quantize="nf4", precision="32-true", max_new_tokens=1))
    beside, alone = re.findall(r"loss, nats per token +(\S+)", capsys.readouterr().out)
    assert beside == alone


GOOD = {"instruction": "a", "output": "b"}
LONG, LARGE = {"instruction": "b" * 600, "output": "c"}, {"instruction": "b" * 9_000_000, "output": "c"}
NUMBERS = "{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
FAULTS = {  # rows, a template, and which commands are asked
    "a bad row": ([GOOD, {"instruction": 3, "output": "b"}], None, "evaluate, generate"),
    "only bad rows": ([{"txt": "a"}] * 3, None, "evaluate, generate"),
    "a row without an answer to learn": ([GOOD, {"messages": [{"role": "user", "content": "a"}]}], None, "evaluate"),
    "a row that is too long": ([GOOD, LONG], None, "evaluate, generate"),
    "a row that is too large": ([GOOD, LARGE], None, "evaluate"),
    "no row": ([], None, "evaluate, generate"),
    "a template that hides answers": ([GOOD], NUMBERS, "evaluate"),
    "a template that is none": ([GOOD], "{% for %}", "evaluate, generate"),
    "a template that refuses": ([GOOD, GOOD | {"system": "c"}], REFUSES, "evaluate, generate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_name_no_option_that_the_command_does_not_have(tiny_folder, tmp_path, fault) -> None:
    rows, template, commands = FAULTS[fault]
    model, path = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "rows.jsonl"
    if template:
        (model / "chat_template.jinja").write_text(template)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation, generation = Evaluate(str(model), str(path)), Generate(str(model), input=str(path))
    for command in commands.split(", "):
        with pytest.raises(UserError) as error:
            evaluate(evaluation) if command == "evaluate" else generate(generation)
        assert not re.search(
            r"(?:data|train|base|method|checkpoint|validation)\.[a-z]|--(?!columns )|skip|drop", str(error.value)
        )


def test_a_folder_is_measured_by_its_held_out_rows_alone(tiny_folder, tmp_path, capsys) -> None:
    folder = write_rows(tmp_path)
    (folder / "train.jsonl").write_text("no JSON\n")
    with open(folder / "validation.jsonl", "a") as file:
        file.write(json.dumps(GOOD | {"id": 7}) + "\n")
    evaluate(Evaluate(str(tiny_folder), str(folder), max_new_tokens=1))
    said = capsys.readouterr()
    assert "3 rows" in said.out
    assert said.err.splitlines()[0] == "not read    the keys id (1 row)"
    (folder / "dev.jsonl").touch()
    with pytest.raises(UserError, match="several files could be meant: dev.jsonl, validation.jsonl") as error:
        evaluate(Evaluate(str(tiny_folder), str(folder)))
    assert error.value.hint == "keep one of them, or name the file itself instead of the folder"


def test_rows_that_are_left_out_are_listed_by_the_run_and_not_by_a_dry_run(tiny_folder, tmp_path, capsys) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [GOOD, {"instruction": "a"}, GOOD | {"output": "b" * 600}, GOOD]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data.path", str(path), "--data.overlong", "drop", "--data.bad_rows", "skip", "--train.max_steps", "1"]
    finetune(tiny_folder, tmp_path, *argv, "--dry_run")
    assert not out.exists()
    assert f"left out: {path}:2 (output is missing); the run's rejected.jsonl lists them" in capsys.readouterr().out
    finetune(tiny_folder, tmp_path, *argv)
    listed = [json.loads(line)["where"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert listed == [f"{path}:2", f"{path}:3"]


def test_a_name_that_no_file_can_have_is_a_mistake_of_the_user(tiny_folder, tmp_path) -> None:
    run, name = finetune(tiny_folder, tmp_path, "--train.max_steps", "1"), "n" * 5000
    rows = str(tmp_path / "data")
    for settings in (Evaluate(name, rows), Evaluate(str(run), rows, base=name), Generate(name, "hi")):
        with pytest.raises(UserError) as error:
            (evaluate if isinstance(settings, Evaluate) else generate)(settings)
        assert error.value.exit_code == 4
    with pytest.raises(UserError, match="File name too long") as error:  # before an hour of answers
        generate(Generate(str(tiny_folder), "hi", output=f"{name}.jsonl"))
    assert error.value.exit_code == 2


def test_shots_are_measured_as_the_same_turns_spelt_out_in_each_row(tiny_folder, tmp_path) -> None:
    folder = write_rows(tmp_path)
    train, held_out = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )

    def chat(row: dict[str, str], **more: bool) -> list[dict[str, object]]:
        user = {"role": "user", "content": row["instruction"]}
        return [user, {"role": "assistant", "content": row["output"], **more}]

    held_out[0]["system"] = "Be brief."
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    spelt = []
    for row in held_out:
        system = [{"role": "system", "content": row["system"]}] if "system" in row else []
        shots = [turn for shot in train[:2] for turn in chat(shot, train=False)]
        spelt.append({"messages": [*system, *shots, *chat(row)]})
    (tmp_path / "spelt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spelt))
    common = {"precision": "32-true", "max_new_tokens": 8}
    rows, (score,) = measure(Evaluate(str(tiny_folder), str(folder), shots=2, **common))
    wanted, (want,) = measure(Evaluate(str(tiny_folder), str(tmp_path / "spelt.jsonl"), **common))
    assert [(row.ids, row.trained) for row in rows] == [(row.ids, row.trained) for row in wanted]
    assert (score.loss, score.answers) == (want.loss, want.answers)
    _, (none,) = measure(Evaluate(str(tiny_folder), str(folder), **common))
    assert none.loss != score.loss


def test_shots_come_from_a_file_that_is_named_or_beside_the_rows(tiny_folder, tmp_path) -> None:
    file = str(write_rows(tmp_path) / "validation.jsonl")
    with pytest.raises(UserError, match="the rows for shots are not named") as error:
        evaluate(Evaluate(str(tiny_folder), file, shots=1))
    assert (error.value.where, error.value.exit_code) == ("shots_from", 2)
    with pytest.raises(ValueError, match="shots_from is used only with shots"):
        Evaluate(str(tiny_folder), file, shots_from=file)


def test_several_runs_are_measured_and_asked_each_as_alone(tiny_folder, tmp_path, capsys) -> None:
    learn = "--train.epochs", "20", "--train.lr", "1e-2"
    runs = [finetune(tiny_folder, tmp_path, *learn, out=name, method=name) for name in ("lora", "adapter_v2")]
    rows, out = str(tmp_path / "data" / "validation.jsonl"), tmp_path / "out.jsonl"
    common = {"precision": "32-true", "max_new_tokens": 8}
    evaluate(Evaluate(str(runs[0]), rows, also=(str(runs[1]),), output=str(out), **common))
    said = capsys.readouterr().out
    assert re.search(r"2 rows +base +lora +adapter_v2\n", said)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for run in runs:
        (score,) = measure(Evaluate(str(run), rows, compare_base=False, **common))[1]
        assert [record[run.name]["answer"] for record in records] == score.answers
        assert f"{score.loss:.4f}" in said
    out.unlink()
    asked = {"precision": "32-true", "sampling": Sampling(max_new_tokens=8)}
    generate(Generate(str(runs[0]), input=rows, output=str(out), also=(str(runs[1]),), **asked))
    answers = [json.loads(line)["answers"] for line in out.read_text().splitlines()]
    assert answers == [{run.name: record[run.name]["answer"] for run in runs} for record in records]
    generate(Generate(str(runs[0]), "Colour of blood?", also=(str(runs[1]),), **asked))
    assert capsys.readouterr().out == "".join(f"{run.name}:\n{answers[0][run.name]}\n" for run in runs)
