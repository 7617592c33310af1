"""The pages that add a method and a model family, followed in a copy: files, changes and commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_folder
from test_tutorials import PAGES, ROOT, SHORTER, plain, simple_commands

PART = re.compile(r"^```(\w*) ?.*\n((?:.*\n)*?)```$", re.M)
FILE = re.compile(r"`([\w/.-]+\.(?:py|yaml))`")


class Copy:
    """A copy of the project that is changed as a page says."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, []
        for name in ("litpeft", "tests", "config_hub", "tutorials"):
            # bytecode of litpeft is that of the copy; that of tests names the files that pytest compiled
            unlike = shutil.ignore_patterns("__pycache__") if name == "tests" else None
            shutil.copytree(ROOT / name, folder / name, ignore=unlike)
        for name in ("README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        shape = {"vocab_size": 258, "max_position_embeddings": 1024, "dtype": "bfloat16"}
        make_folder(folder / "checkpoints/SmolLM2-135M-Instruct", **shape)

    def run(self, *words: str) -> str:
        """Runs a module, litpeft shortened as in test_tutorials.py; returns what it prints."""
        if words[0] == "litpeft" and "--dry_run" not in words:
            words = *words, *shlex.split(SHORTER.get(words[1], ""))
        env = os.environ | {"PYTHONPATH": str(self.folder)}
        argv = [sys.executable, "-m", *words]
        done = subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        self.written.append(path)

    def insert(self, path: Path, name: str, line: str) -> None:
        """Puts a line at the end of the dict of that name."""
        dict_of_that_name = re.compile(rf"^({name}\b.*= {{\n(?:[^}}].*\n)*)}}", re.M)
        changed, count = dict_of_that_name.subn(lambda found: f"{found[1]}{line}}}", path.read_text())
        assert count == 1, (path, name)
        path.write_text(changed)

    def change(self, path: Path, diff: str) -> None:
        """Makes the change that the lines of a diff show."""
        lines = diff.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert path.read_text().count(before) == 1, f"{path} has no {before!r}"
        path.write_text(path.read_text().replace(before, after))


def follow(page: str, copy: Copy) -> tuple[int, int]:
    """Does what a page says; returns how many commands were run and how many lines of their output were compared."""
    text = PAGES[page].read_text()
    ran, compared, end, path, said = 0, 0, 0, copy.folder, ""
    for part in PART.finditer(text):
        prose, language, content = text[end : part.start()], *part.groups()
        end = part.end()
        path = copy.folder / named[-1] if (named := FILE.findall(prose)) else path
        if language == "diff":
            copy.change(path, content)
        elif language in ("python", "yaml") and not path.exists():
            copy.write(path, content)
        elif place := re.search(r"In `([A-Z]+)` of `", prose):
            copy.insert(path, place[1], content)
        elif language == "bash":
            said = "".join(copy.run(*words[2:]) for words in simple_commands(content))
            ran += 1
        elif content.startswith("$ "):
            for line in content.splitlines():
                if line.startswith("$ "):
                    said, ran = copy.run(*line.split()[1:]), ran + 1
                else:
                    assert plain(line, False) in plain(said, False), (line, said)
                    compared += 1
        elif not language and not prose.strip():
            assert plain(content, False) in plain(said, False), (content, said)
            compared += 1
    return ran, compared


@pytest.mark.slow
@pytest.mark.parametrize("page", ["add_a_method", "add_a_model"])
def test_a_page_that_adds_something_works_from_its_first_line_to_its_last(page: str, tmp_path) -> None:
    copy = Copy(tmp_path / "copy")
    ran, compared = follow(page, copy)
    assert ran > 0
    assert compared > 0
    tests = [str(path) for path in copy.written if path.name.startswith("test_")]
    if tests:
        assert "failed" not in copy.run("pytest", *tests)
