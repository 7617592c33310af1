"""Rules of the project that a reader relies on."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from litpeft.cli import COMMANDS
from litpeft.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "litpeft").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").rglob("*.md"))]


def test_every_error_code_names_one_place() -> None:
    codes = Counter(
        code
        for file in SOURCES
        for code in re.findall(r'"((?:CONFIG|DATA|MODEL|NUMERIC|RESOURCE)-\d{3})"', file.read_text())
    )
    assert len(codes) > 100
    assert [code for code, count in codes.items() if count > 1] == []


def test_nothing_is_decided_by_a_part_of_a_parameters_name() -> None:
    names = "|".join(METHODS)
    assert [file for file in SOURCES if re.search(rf'"({names})" (not )?in ', file.read_text())] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_and_a_config(method: str) -> None:
    assert (ROOT / "tutorials" / f"finetune_{method}.md").exists()
    assert list((ROOT / "config_hub").rglob(f"{method}.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from litpeft.cli import _load
    from litpeft.methods import method_class
    from litpeft.yaml_keys import check_options

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    lines = re.findall(
        r"^(?:\S*/)?litpeft ([a-z][^#\n]*)", "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)), re.M
    )
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        name = " ".join(words[:2]) if words[0] == "finetune" else words[0]
        assert name in COMMANDS, line
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(_load(COMMANDS[name].settings), as_group=False)
        if COMMANDS[name].method:
            parser.add_class_arguments(method_class(COMMANDS[name].method), "method")
        check_options(parser, words[len(name.split()) :])


def test_a_command_for_the_user_to_copy_is_put_together_by_command_line_which_quotes() -> None:
    by_hand = re.compile(rf"litpeft (?:{'|'.join({name.split()[0] for name in COMMANDS})})\b[^\"'`\n]*\{{")
    assert [(file.name, hit) for file in SOURCES for hit in by_hand.findall(file.read_text())] == []
