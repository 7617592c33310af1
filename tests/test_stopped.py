"""A result that is not the end of its run says so, and says how the run goes on."""

import io
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from short_runs import LONG, assert_same, cut, start, train, wait_for_step, words

from litpeft.cli import main
from litpeft.exchange.identity import checksum

PROMPT = "--prompt", "x", "--sampling.max_new_tokens", "1"


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory) -> Path:
    """A finished run with a checkpoint of each of its four steps. Tests must not change it."""
    return train(tiny_folder, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tiny_folder, tmp_path_factory) -> tuple[Path, int, str]:
    """A run that SIGTERM stopped, at which step, and its last words."""
    folder = tmp_path_factory.mktemp("stopped folder")  # with a space, which a shell must not see
    run, said = folder / "run", folder / "said"
    process = start(words(tiny_folder, run, LONG), said)
    wait_for_step(run, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75, said.read_text()
    return run, json.loads((run / "final" / "delta.json").read_text())["steps_done"], said.read_text()


def told(capsys, *argv: object) -> str:
    """Returns what a command says on stderr."""
    capsys.readouterr()
    main([str(word) for word in argv])
    return capsys.readouterr().err


def test_the_command_that_a_stopped_run_tells_first_goes_on_with_it(stopped, tiny_folder, tmp_path, capsys) -> None:
    run, step, said = stopped
    lines = said.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("to go on "))
    command = shlex.split(lines[at].removeprefix("to go on "))
    assert f"SIGTERM at step {step} of 40" in lines[at + 1]
    report = (run / "report.md").read_text()
    assert report.index(shlex.join(command)) < report.index("SIGTERM")
    assert command[:3] == ["litpeft", "finetune", "lora"]
    copy = shutil.copytree(run, tmp_path / "run")  # so that the run itself stays as it was stopped
    assert told(capsys, *(word.replace(str(run), str(copy)) for word in command[1:])).count("step 40/40")
    assert "was stopped" not in (copy / "report.md").read_text()
    assert_same(copy, train(tiny_folder, tmp_path / "whole", LONG))


def test_each_command_says_which_step_of_a_stopped_run_it_uses(stopped, tmp_path, capsys, monkeypatch) -> None:
    run, step, _ = stopped
    rows = run.parent / "data" / "validation.jsonl"
    line = f"{run}/final holds step {step} of 40; the run was stopped; it goes on with: litpeft finetune lora --config "
    assert line in told(capsys, "generate", run, *PROMPT)
    assert line in told(capsys, "generate", run / "final", *PROMPT)
    assert line in told(capsys, "evaluate", run, rows, "--max_new_tokens", 1)
    assert line in told(capsys, "merge", run, "--out", tmp_path / "merged")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert line in told(capsys, "chat", run)


def test_a_result_that_was_copied_alone_names_no_command_that_cannot_go_on(stopped, tmp_path, capsys) -> None:
    shutil.copytree(stopped[0] / "final", tmp_path / "run" / "final")
    said = told(capsys, "generate", tmp_path / "run", *PROMPT)
    assert f"holds step {stopped[1]} of 40; the run was stopped\n" in said


def test_a_checkpoint_newer_than_the_result_is_named(stopped, whole, tmp_path, capsys) -> None:
    run = shutil.copytree(stopped[0], tmp_path / "run")
    shutil.copytree(whole / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000039")
    (run / "report.md").unlink()  # as a kill leaves it
    said = told(capsys, "generate", run, *PROMPT)
    assert f"holds step {stopped[1]} of 40; the run was stopped; there is a newer checkpoint, of step 39; it go" in said


def test_a_finished_run_says_nothing_until_it_goes_on_and_is_killed(whole, tmp_path, capsys) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    assert "holds step" not in told(capsys, "generate", run, *PROMPT)
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000006")
    assert "holds step 4 of 4; there is a newer checkpoint, of step 6" in told(capsys, "generate", run, *PROMPT)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_format_2_says_what_it_knows(finished: bool, whole, tmp_path, capsys) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "final" / "delta.json"
    facts = json.loads(path.read_text()) | {"format": 2, "step": 2, "finished": finished}
    facts["base"] = {key: facts["base"][key] for key in ("path", "fingerprint", "storage")}
    for key in ("checksum", "steps_done", "steps_planned"):
        del facts[key]
    path.write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    if not finished:
        (run / "report.md").unlink()
    said = told(capsys, "generate", run, *PROMPT)
    assert ("holds step 2; the run was stopped; there is a newer checkpoint, of step 4" in said) == (not finished)
    assert ("holds step" in said) == (not finished)  # a finished one may have taken its best step


def test_a_run_without_a_result_says_how_it_goes_on(whole, tmp_path, capsys) -> None:
    run = cut(whole, 2, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(run), *PROMPT])
    said = capsys.readouterr().err
    assert stop.value.code == 4
    command = said.partition("it goes on with: ")[2].strip()
    assert "after its checkpoint of step 2" in said
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    main(shlex.split(command)[1:])
    assert_same(run, whole)
