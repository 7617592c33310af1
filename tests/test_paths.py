"""Paths on the command line and in YAML files."""

import pytest
from conftest import kinds

from litpeft.cli import COMMANDS, main, parse
from litpeft.cli.paths import PATHS

FILE = """
base: {dir: ~/base}
data: {path: [~/a.csv, b.csv], system: ~/x}
out: ~/run
ending: {neutral: ~/neutral.txt}
"""


def test_every_path_is_an_option_of_some_command() -> None:
    assert set(PATHS) <= {key for name in COMMANDS for key in kinds(name)}


def test_the_home_folder_is_meant_where_no_shell_has_seen_the_tilde(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (file := tmp_path / "run.yaml").write_text(FILE)
    settings, _, _ = parse("finetune lora", COMMANDS["finetune lora"], ["--config", str(file)])
    assert (settings.base.dir, settings.out) == (f"{tmp_path}/base", f"{tmp_path}/run")
    assert list(settings.data.path) == [f"{tmp_path}/a.csv", "b.csv"]
    assert (settings.data.system, settings.ending.neutral) == ("~/x", f"{tmp_path}/neutral.txt")
    argv = ["~/base", "--system", "~/x", "--input=~/a.jsonl", '--also=["~/b", "~c"]']
    settings, _, _ = parse("generate", COMMANDS["generate"], argv)
    assert (settings.model, settings.system) == (f"{tmp_path}/base", "~/x")
    assert (settings.input, list(settings.also)) == (f"{tmp_path}/a.jsonl", [f"{tmp_path}/b", "~c"])
    settings, _, _ = parse("combine", COMMANDS["combine"], ["r", "o", "--also", '{"~/b": 0.5}'])
    assert settings.also == {f"{tmp_path}/b": 0.5}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["finetune", "lora", "--config", "empty.yaml"], "empty.yaml:4: out must be a path, got ''"),
        (["finetune", "lora", "--base.dir", "b", "--data.path", "d", "--out="], "out must be a path, got ''"),
        (["merge", ""], "run must be a path, got ''"),
        (["merge", "--run", ""], "--run is no option"),
        (["evaluate", "m", "--data", ""], "data must be a path, got ''"),
        (["evaluate", "m", ""], "data must be a path, got ''"),
    ],
)
def test_an_empty_path_is_not_the_folder_that_one_is_in(
    argv: list[str], told: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text(FILE.replace("~/run", "''"))
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert f"error: {told}" in capsys.readouterr().err
