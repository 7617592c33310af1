"""Rules of the project that a reader relies on."""

import re
from collections import Counter
from pathlib import Path

import pytest

from litpeft.cli import COMMANDS
from litpeft.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "litpeft").rglob("*.py"))


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


def test_a_command_for_the_user_to_copy_is_put_together_by_command_line_which_quotes() -> None:
    by_hand = re.compile(rf"litpeft (?:{'|'.join({name.split()[0] for name in COMMANDS})})\b[^\"'`\n]*\{{")
    assert [(file.name, hit) for file in SOURCES for hit in by_hand.findall(file.read_text())] == []
