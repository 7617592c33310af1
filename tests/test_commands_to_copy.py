"""Commands that litpeft prints or writes for the user to copy."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder
from safetensors.torch import load_file

from litpeft.cli import COMMANDS, main, parse

ODD = "it's 2 words; $HOME"


def parsed(line: str) -> object:
    """Returns the settings of a command, read as a shell reads it."""
    program, *words = shlex.split(line)
    assert program == "litpeft"
    count = 2 if words[0] == "finetune" else 1
    name = " ".join(words[:count])
    return parse(name, COMMANDS[name], words[count:])[0]


def commands(text: str) -> list[str]:
    return re.findall(r"litpeft (?:chat|convert|evaluate|finetune|merge) [^\n`]*", text)


def test_a_runs_commands_keep_a_path_of_odd_letters_whole(tmp_path, capsys) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    run = finetune(make_folder(folder / "base"), folder, "--train.max_steps", "1")
    main(["merge", str(run)])
    printed = [parsed(line) for line in commands(capsys.readouterr().out)]
    paths = [{key: value for key, value in vars(settings).items() if key in ("model", "run")} for settings in printed]
    assert paths == [{"model": str(run)}, {"model": str(run)}, {"run": str(run)}, {"model": str(run / "merged")}]
    assert Path(printed[0].data) == folder / "data" / "validation.jsonl"
    written = commands((run / "report.md").read_text())
    assert [parsed(line) for line in written[:3]] == printed[:3]
    assert parsed(written[3]).out == f"{run}-again"
    (comment,) = commands((run / "run.yaml").read_text())
    assert parsed(comment).data.path == str(folder / "data")


def test_converts_commands_keep_a_path_of_odd_letters_whole(tmp_path, capsys) -> None:
    source, out = make_folder(tmp_path / ODD), tmp_path / f"{ODD} too"
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(out)])  # safetensors, which need no conversion
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    hint = capsys.readouterr().err
    main(["convert", str(source), str(out)])
    told = commands(hint) + commands(capsys.readouterr().out)
    assert [parsed(line).model for line in told] == [str(source), str(out)]


def test_run_yaml_stays_yaml_where_the_path_has_two_lines(tiny_folder, tmp_path) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.max_steps", "1", out="two\nlines: 3")
    settings, *_ = parse("finetune lora", COMMANDS["finetune lora"], ["--config", str(run / "run.yaml")])
    assert settings.out == str(run)
