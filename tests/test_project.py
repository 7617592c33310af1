"""Rules of the project that a reader relies on."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
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


ROOMS = (
    "core",
    "data",
    "model",
    "methods",
    "exchange",
    "generate",
    "train",
    "cli",
)  # each imports from those before it
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in SOURCES}


def imported(name: str) -> set[str]:
    """Returns the modules of litpeft that a module imports, wherever in its file, without the packages around them."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            longer = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= longer if len(longer) == len(node.names) else longer | {node.module}
    return found & set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".")])
def test_a_room_imports_from_itself_and_the_rooms_below_it(name: str) -> None:
    rooms = {module.split(".")[1] for module in imported(name) if module != "litpeft"}
    room = name.split(".")[1]
    allowed = ROOMS if room == "__main__" else ROOMS[: ROOMS.index(room) + 1]
    assert rooms <= set(allowed)


def test_no_module_imports_itself_by_way_of_others() -> None:
    list(TopologicalSorter({name: imported(name) for name in MODULES}).static_order())
