"""The command line as a user meets it: real processes for what is about start-up, real argv for the rest."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import kinds, method_of, storage_of
from model_switches import CONFIG

from litpeft.cli import COMMANDS, main, parse
from litpeft.cli.methods import merges
from litpeft.core.kinds import alternatives, in_words
from litpeft.methods import METHODS
from litpeft.model.delta import attach
from litpeft.model.fold import unfoldable
from litpeft.model.gpt import GPT
from litpeft.model.quantize.quantized import store
from litpeft.train.settings import Finetune

ROOT = Path(__file__).parent.parent


def litpeft(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "litpeft", *argv], capture_output=True, text=True, env=environment)


def fails(capsys, *argv: str) -> tuple[int, str]:
    """Runs a command that must fail; returns its exit code and its first line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err.splitlines()[0]


def test_a_program_that_is_done_runs_what_others_asked_for_at_its_end() -> None:
    code = "import atexit, sys; atexit.register(print, 'at the end'); sys.argv[1:] = ['--version']; "
    code += "from litpeft.__main__ import program; program()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[1:] == ["at the end", ""]


def test_after_an_error_no_library_says_anything(tiny_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    given = ("--base.dir", str(tiny_folder), "--data.path", str(missing), "--out", str(tmp_path / "run"))
    done = litpeft("finetune", "lora", *given)
    assert done.returncode == 3
    assert done.stderr == f"litpeft: error: {missing}: there is no such file or folder\n"


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "litpeft", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    rows = dict(re.findall(r"^  (\S+(?: \S+)?) {2,}(\S.*)$", done.stdout, re.M))
    assert rows == {name: command.help for name, command in COMMANDS.items()}
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "litpeft.cli" in imported
    assert not imported & {"torch", "lightning", "jsonargparse", "numpy", "yaml", "huggingface_hub", "rich"}


def test_download_and_a_misspelt_command_start_without_torch(tmp_path) -> None:
    code = "import sys, litpeft.cli\ntry: litpeft.cli.main({argv})\n"
    code += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    for argv, exit_code in ((["fintune", "lora"], 2), (["download", "not a name"], 2), (["download", "--help"], 0)):
        done = subprocess.run([sys.executable, "-c", code.format(argv=argv)], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.splitlines()[-1] == f"{exit_code} False", done


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lora", "--out", "x"], "there is no command 'lora' (did you mean \"finetune lora\"?)"),
        (["fintune", "lora"], "there is no command 'fintune' (did you mean \"finetune lora\"?)"),
        (["finetune", "lorra"], "there is no command 'finetune lorra' (did you mean \"finetune lora\"?)"),
        (["study"], "there is no command 'study'\n"),
        (["train"], "there is no command 'train' (did you mean \"finetune lora\"?)"),
        (["infer"], "there is no command 'infer' (did you mean \"generate\"?)"),
        (["mrge"], "there is no command 'mrge' (did you mean \"merge\"?)"),
        (["finetune", "lora", "--dry_run", "-v"], "there is no option -v\n"),
        (["merge", "x", "-f"], "there is no option -f\n"),
        (["generate", "x", "-prompt", "a"], 'there is no option -prompt (did you mean "prompt"?)'),
        (["merge"], "the following arguments are required: run"),
        (["merge", "x", "--dtyp", "float32"], 'there is no option --dtyp (did you mean "dtype"?)'),
        (["finetune", "lora", "--lr", "1"], 'there is no option --lr (did you mean "train.lr"?)'),
        (
            ["finetune", "lora", "--method.alhpa", "1"],
            'there is no option --method.alhpa (did you mean "method.alpha"?)',
        ),
        (["--verbose"], "'--verbose' comes before a command"),
        (["chat", "--model", "x"], "--model is no option: its value is given alone, without a name before it"),
        (
            ["finetune", "lora", "--train", "c.yaml"],
            "--train takes no value of its own; its keys are --train.batch_size",
        ),
        (["finetune", "lora", "--train.lr"], "--train.lr needs a value: a number"),
        (["finetune", "lora", "--train.lr="], "train.lr must be a number, got ''"),
        (
            ["generate", "m", "--prompt", "-x"],
            "--prompt needs a value: text or null; one that begins with - is given as",
        ),
        (
            ["finetune", "lora", "--data.path", "my", "rows.jsonl"],
            "no option takes 'rows.jsonl'; a value that has spaces",
        ),
        (["finetune", "lora", "--base.cache", "maybe"], "base.cache must be true or false, got 'maybe'"),
    ],
)
def test_wrong_words_are_named_with_the_nearest_right_one(argv: list[str], message: str, capsys) -> None:
    code, line = fails(capsys, *argv)
    assert code == 2
    assert message in f"{line}\n"


FULL = pytest.param("finetune full", marks=pytest.mark.full)  # its settings are those of lora, but the method's


@pytest.mark.parametrize("name", ["finetune lora", FULL, "generate", "merge", "evaluate"])
def test_a_value_of_another_type_is_told_in_plain_words_with_its_key(name: str, tmp_path, capsys) -> None:
    wrong = {key: kind for key, kind in kinds(name).items() if str not in alternatives(kind)}
    assert len(wrong) > 1
    file = tmp_path / "c.yaml"
    for key, kind in wrong.items():
        value = {"a": []} if "dict" in str(kind) else [[]]
        if key in ("train.optimizer_args", "method", "data.template_options", "template_options"):  # may hold anything
            value = 3
        group, _, leaf = key.rpartition(".")
        file.write_text(json.dumps({group: {leaf: value}} if group else {key: value}))
        code, line = fails(capsys, *name.split(), "--config", str(file))
        assert code == 2
        assert line.startswith(f"litpeft: error: {file}:1: {key} must be {in_words(kind)}, got "), line
        file.write_text(json.dumps({group: {leaf: {"a": 1}}} if group else {key: {"a": 1}}))
        if "dict" not in str(kind):
            said = f'error: {file}:1: "{key}" must be {in_words(kind)}, got keys and values'
            assert said in fails(capsys, *name.split(), "--config", str(file))[1]


def test_what_a_value_may_be_is_said_in_words() -> None:
    assert in_words(int | None) == "a whole number or null"
    assert in_words(Literal["a", "b", "c"] | None) == "a, b, c or null"
    assert in_words(tuple[str, ...]) == "a list, each item text"
    assert in_words(dict[str, int]) == "keys and values, each value a whole number"


YAML = "base: {dir: b}\ndata: {path: d}\nout: o\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (YAML + "train:\n  lr: 1e-3\n  lrr: 1\n", 6, 'there is no key "train.lrr" (did you mean "train.lr"?)'),
        (YAML + "method: {rnk: 4}\n", 4, 'there is no key "method.rnk" (did you mean "method.rank"?)'),
        (YAML + "learning_rate: 1\n", 4, 'there is no key "learning_rate"'),
        (YAML + "train:\n  lr: 1\n  lr: 2\n", 6, 'the key "train.lr" stands twice'),
        (YAML + "train: {optimizer_args: {eps: 1, eps: 2}}\n", 4, 'the key "train.optimizer_args.eps" stands twice'),
        (YAML + "train:\n  epochs: two\n", 5, "train.epochs"),
        (YAML + "train: {batch_size: 0}\n", 4, "train.batch_size must be at least 1, got 0"),
        (YAML + "train: {schedule: cosin}\n", 4, "train.schedule must be cosine, linear or constant"),
        (YAML + "train: {micro_batch_size: 2}\n", 4, "train.micro_batch_size is used only with data.packing false"),
        (YAML + "train: {schedule: constant, min_lr: 1e-5}\n", 4, "train.min_lr is not used"),
        (YAML + "method: {rank: 0}\n", 4, "method.rank must be at least 1 and at most 65536, got 0"),
        (YAML + "train: [1, 2\n", 5, "not YAML"),
        ("- a\n- b\n", None, "the file must hold keys and values"),
        ("", None, "the file must hold keys and values"),
        (YAML + "train: 3\n", 4, '"train" must hold keys and values'),
        (YAML.replace("path: d", "path: d, mask_prompt: null"), 2, '"data.mask_prompt" must not be null'),
        (YAML + "train.lr: 1\n", 4, 'there is no key "train.lr"; in a file it stands below train, as train: {lr: ...}'),
        (YAML + "config: other.yaml\n", 4, 'there is no key "config"'),
        (YAML + "train: &t {optimizer_args: *t}\n", 4, '"train.optimizer_args" holds itself'),
        (YAML + "train: {max_time: .inf}\n", 4, "train.max_time must be a finite number"),
        (YAML.replace("out: o", "out: !!python/object/apply:os.system ['touch pwned']"), 3, "python/object/apply"),
    ],
)
def test_wrong_yaml_is_named_with_its_file_and_line(
    text: str, line: int | None, message: str, tmp_path, capsys
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    code, said = fails(capsys, "finetune", "lora", "--config", str(file))
    assert code == 2
    assert message in said
    assert (str(file) if line is None else f"{file}:{line}:") in said
    assert not Path("pwned").exists()


def test_options_win_over_the_config_wherever_it_stands(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(YAML + "train: {lr: 1e-3, optimizer_args: {betas: [0.9, 0.95]}}\nmethod: {rank: 4}\n")
    argv = ["--method.rank", "2", "--dry_run", "--config", str(file), "--train.epochs=3"]
    settings, method, _ = parse("finetune lora", COMMANDS["finetune lora"], argv)
    assert isinstance(settings, Finetune)
    assert (method.rank, settings.train.lr, settings.train.epochs, settings.dry_run) == (2, 1e-3, 3, True)
    assert settings.train.optimizer_args == {"betas": [0.9, 0.95]}


def test_print_config_prints_a_config_that_parses_to_the_same(tmp_path, capsys) -> None:
    argv = ["--base.dir", "b", "--data.path", "d", "--out", "o", "--train.lr", "3e-4"]
    with pytest.raises(SystemExit):
        main(["finetune", "lora", *argv, "--print_config"])
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    command = COMMANDS["finetune lora"]
    assert parse("finetune lora", command, ["--config", str(file)])[:2] == parse("finetune lora", command, argv)[:2]


def test_an_internal_error_is_one_line_and_debug_shows_the_rest(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("litpeft.exchange.merge.merge", lambda settings: 1 / 0)
    code, line = fails(capsys, "merge", "x")
    assert (code, line) == (70, "litpeft: internal error: ZeroDivisionError: division by zero")
    with pytest.raises(SystemExit):
        main(["merge", "x", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_the_methods_are_listed_with_what_their_files_say(capsys) -> None:
    main(["methods"])
    rows = dict(re.findall(r"^(\w+) +(\d\S* +(?:yes|no|if all) +\w+ +\d{4}\.\d{5}) ", capsys.readouterr().out, re.M))
    assert list(rows) == list(METHODS)
    assert rows["dora"].split() == ["1e-3", "yes", "LORA", "2402.09353"]
    main(["methods", "dora"])
    said = capsys.readouterr().out
    assert "n = m / ||W + s B A||" in said
    assert "train.lr 0.001" in said
    assert "--method.rank INTEGER" in said
    assert fails(capsys, "methods", "dorra") == (
        2,
        "litpeft: error: there is no method 'dorra' (did you mean \"dora\"?)",
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_listed_as_merging_if_its_deltas_fold(name: str) -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    if storage_of(name):
        store(model, storage_of(name).name, True, torch.float32)
    attach(model, method_of(name))
    parts = method_of(name).parts if name == "combo" else []
    assert merges(name) == ("if all" if parts else "no" if unfoldable(model) else "yes")
