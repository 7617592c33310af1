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

from litpeft.terminal import clean, say, tell

ROOT = Path(__file__).parent.parent
# an escape sequence, BEL, backspace, carriage return, C1's CSI, a right-to-left override and isolate
EVIL = "\x1b[2J\x07\x08\r\x9b31m\u202e\u2066!"
DANGER = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def litpeft(*argv: str, **settings) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "litpeft", *argv], capture_output=True, encoding="utf-8", env=environment, **settings
    )


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
    (folder / "c.yaml").write_text(json.dumps({f"a{EVIL}": 1}))
    return ["finetune", "lora", "--config", str(folder / "c.yaml")]


def evil_file(folder: Path, base: Path) -> list[str]:
    (folder / f"{EVIL}\nhint: all is well.jsonl").write_text("{}\n")
    return ["generate", str(base), "--input", str(folder / f"{EVIL}\nhint: all is well.jsonl")]


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
    "make", [evil_config, evil_file, evil_row, evil_template, evil_family, evil_option, evil_value]
)
def test_no_text_from_outside_reaches_the_terminal_raw(make, tmp_path, tiny_folder):
    done = litpeft(*make(tmp_path, tiny_folder))
    assert done.returncode in (0, 2, 3, 4), done.stderr
    said = done.stdout + done.stderr
    assert DANGER.search(said) is None, repr(said)
    assert "!" in said
    assert "\nhint: all is well" not in said


def test_an_answer_is_cleaned_for_a_terminal_and_left_alone_in_a_pipe(monkeypatch):
    from litpeft import terminal

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
    assert text.count("\x1b[32m") == text.count("\x1b[0m") > 0
    assert DANGER.search(text.replace("\x1b[32m", "").replace("\x1b[0m", "")) is None
