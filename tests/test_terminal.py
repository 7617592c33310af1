"""What reaches a terminal: nothing that came from outside may drive it, and one file prints."""

import ast
import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from short_runs import start

from litpeft.cli import main
from litpeft.core.terminal import clean, say, tell

ROOT = Path(__file__).parent.parent
# an escape sequence, BEL, backspace, carriage return, C1's CSI, a right-to-left override and isolate
EVIL = "\x1b[2J\x07\x08\r\x9b31m\u202e\u2066!"
DANGER = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_what_is_clean_holds_no_control_character_but_line_breaks():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        bad = unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF"),
            *("LRI", "RLI", "FSI", "PDI"),
        )
        kept = clean(character)
        expected = {"\n": "\n", "\t": "    "}.get(character, "\ufffd" if bad else character)
        assert kept == expected, hex(code)
    assert clean("👩\u200d🚀 עברית \u200fé\r\n") == "👩\u200d🚀 עברית \u200fé\n"


def test_messages_are_cleaned(capsys):
    say(EVIL)
    tell(EVIL)
    assert not any(map(DANGER.search, capsys.readouterr()))


def test_no_other_file_writes_to_the_terminal():
    wrong = []
    for file in sorted((ROOT / "litpeft").rglob("*.py")):
        if file.name in ("terminal.py", "renderer.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.id if isinstance(node, ast.Name) else ""
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
            if name == "print" or re.match(r"sys\.std(out|err)\.(write|buffer)|traceback\.print|sys\.__std", text):
                wrong.append(f"{file.name}:{node.lineno}")
    assert wrong == []


def evil_model(folder: Path, base: Path) -> Path:
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def evil_config(folder: Path, base: Path) -> list[str]:
    (folder / "c.yaml").write_text(json.dumps({f"a{EVIL}\nhint: all is well": 1}))
    return ["finetune", "lora", "--config", str(folder / "c.yaml")]


def evil_file(folder: Path, base: Path) -> list[str]:
    (folder / f"{EVIL}\nhint: all is well.jsonl").write_text("{}\n")
    return ["generate", str(base), "--input", str(folder / f"{EVIL}\nhint: all is well.jsonl")]


def evil_rows(folder: Path, base: Path) -> list[str]:
    data = folder / f"{EVIL}\nhint: all is well.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n' + "[]\n" * 3)
    return ["finetune", "lora", "--base.dir", str(base), "--data.path", str(data), "--out", str(folder / "out")]


def evil_table(folder: Path, base: Path) -> list[str]:
    (folder / "data").mkdir()
    (folder / "data" / f"train{EVIL}\nhint: all is well.csv").touch()
    return ["finetune", "lora", "--base.dir", str(base), "--data.path", str(folder / "data"), "--out", "o"]


def evil_row(folder: Path, base: Path) -> list[str]:
    (folder / "rows.jsonl").write_text(json.dumps({EVIL: "a", "instruction": "a"}) + "\n", encoding="utf-8")
    return ["evaluate", str(base), str(folder / "rows.jsonl")]


def evil_template(folder: Path, base: Path) -> list[str]:
    model = evil_model(folder, base)
    source = "{{ raise_exception(" + repr(f"{EVIL}\nhint: all is well") + ") }}"
    (model / "chat_template.jinja").write_text(source, encoding="utf-8", newline="")
    return ["generate", str(model), "--prompt", "a"]


def evil_family(folder: Path, base: Path) -> list[str]:
    model = evil_model(folder, base)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": EVIL}))
    return ["--debug", "generate", str(model), "--prompt", "a"]


def evil_option(folder: Path, base: Path) -> list[str]:
    return ["generate", str(base), f"--{EVIL}", "1"]


def evil_value(folder: Path, base: Path) -> list[str]:
    arguments = ["--base.dir", str(base), "--data.path", f"x{EVIL}", "--out", "o"]
    return ["finetune", "lora", *arguments, "--print_config"]


@pytest.mark.parametrize(
    "make",
    [evil_config, evil_file, evil_rows, evil_table, evil_row, evil_template, evil_family, evil_option, evil_value],
)
def test_no_text_from_outside_reaches_the_terminal_raw(make, tmp_path, tiny_folder):
    process = start(make(tmp_path, tiny_folder), tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_bytes().decode()
    assert process.exitcode in (0, 2, 3, 4), said
    assert DANGER.search(said) is None, repr(said)
    assert "!" in said
    assert "\nhint: all is well" not in said


def test_an_answer_is_cleaned_for_a_terminal_and_left_alone_in_a_pipe(monkeypatch):
    from litpeft.core import terminal

    class Screen(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Screen(), clean(EVIL)), (io.StringIO(newline=""), EVIL)):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write(EVIL)
        assert stream.getvalue() == expected


def test_a_dry_run_in_a_terminal_shows_only_colours_of_its_own(tmp_path, tiny_folder):
    row = {"instruction": f"a{EVIL}\x1b[32mgreen", "output": "b\x1b[0mc"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = ["finetune", "lora", "--base.dir", str(tiny_folder), "--data.path", str(tmp_path / "rows.jsonl")]
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "litpeft", *words, "--out", str(tmp_path / "o"), "--dry_run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment) as program:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 1 << 16):
                shown += piece
        except OSError:  # the end, on Linux
            pass
    os.close(master)
    text = shown.decode().replace("\r\n", "\n")
    assert program.returncode == 0
    green, inverse, plain = (f"\x1b[{number}m" for number in (32, 7, 0))  # trained tokens, special ones
    assert -1 < text.rfind(green) < text.rfind(plain)
    assert -1 < text.rfind(inverse) < text.rfind(plain)
    assert DANGER.search(text.replace(green, "").replace(inverse, "").replace(plain, "")) is None


def long_words(folder: Path, base: Path, case: str) -> list[str]:
    """Returns a command with 50,000 words or letters of somebody's in one place."""
    long = ("x" if case.endswith("one word") else "x ") * 50_000
    run, kind = ["--base.dir", str(base), "--data.path", str(folder / "rows.jsonl"), "--out", "o"], case.split(",")[0]
    row = {"instruction": "a", "output": "b"}
    said = {"role": "user", "content": "a"}
    rows = {
        "a role": {"messages": [said | {"role": long}]},
        "whether it trains": {"messages": [said | {"loss": long}]},
        "whether a row trains": row | {"train": long},
        "a key": {long: 1},
        "a key of a prompt": {long: 1},
    }
    (folder / "rows.jsonl").write_text(json.dumps(rows.get(kind, row)) + "\n")
    if kind == "a key twice":
        (folder / "rows.jsonl").write_text(f'{{"{long}": 1, "{long}": 2}}\n')
    (folder / "c.yaml").write_text(f'? "{long}"\n: 1\n' if kind == "a YAML key" else f'train: {{"lr": "{long}"}}\n')
    return {
        "a key of a prompt": ["generate", str(base), "--input", str(folder / "rows.jsonl")],
        "a YAML key": ["finetune", "lora", "--config", str(folder / "c.yaml"), *run],
        "a YAML value": ["finetune", "lora", "--config", str(folder / "c.yaml"), *run],
        "an option": ["finetune", "lora", f"--{long}", "1"],
        "a choice": ["finetune", "lora", "--data.format", long, *run],
        "a command": [long],
        "a folder": ["generate", long, "--prompt", "a"],
    }.get(kind, ["finetune", "lora", *run])


PLACES = "a role|whether it trains|whether a row trains|a key|a key twice|a key of a prompt|a YAML key|a YAML value"


@pytest.mark.parametrize("words", ["one word", "many words"])
@pytest.mark.parametrize("place", [*PLACES.split("|"), "an option", "a choice", "a command", "a folder"])
def test_no_text_from_outside_makes_an_error_long(place, words, tmp_path, tiny_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(long_words(tmp_path, tiny_folder, f"{place}, {words}"))
    said = capsys.readouterr()
    assert stop.value.code in (2, 3, 4)
    assert "x" * 30 in said.err.replace(" ", "")
    assert len(said.out + said.err) < 5000
