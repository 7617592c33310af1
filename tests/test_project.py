"""Rules of the project that a reader relies on."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from litpeft.cli import COMMANDS
from litpeft.methods import METHODS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "litpeft").rglob("*.py"))
SEE_MODELS = ("model", "methods", "generate", "train")  # the rooms that see parameters
NAMES = ("name", "key", "n", "k", "ours", "full", "path", "module", "parameter")  # what a parameter's name is called


def partly_matched(source: str) -> list[str]:
    """Returns the expressions that look for a part of a name: `name.startswith(…)`, `"lora" in key`, and their like."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=whole), attr="startswith" | "endswith" | "find")):
                found += [node] if whole in NAMES else []
            case ast.Compare(left=ast.Constant(value=str(part)), ops=[ast.In() | ast.NotIn()], comparators=[whole]):
                is_name = isinstance(whole, ast.Name) and whole.id in NAMES and any(map(str.isalpha, part))
                found += [node] if is_name or part in METHODS else []
            case ast.Compare(left=ast.JoinedStr(), ops=[ast.In() | ast.NotIn()], comparators=[ast.Name(id=whole)]):
                found += [node] if whole in NAMES else []
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize(
    "part", ['name.startswith("lora")', 'key.endswith(f".{leaf}")', '"norm" in n', '"lora" in x()']
)
def test_a_part_of_a_name_is_found(part: str) -> None:
    assert len(partly_matched(f"chosen = [name for name in names if not {part}]")) == 1


def test_nothing_is_decided_by_a_part_of_a_parameters_name() -> None:
    with_models = [file for file in SOURCES if file.relative_to(ROOT / "litpeft").parts[0] in SEE_MODELS]
    with_models += [ROOT / f"litpeft/exchange/{name}.py" for name in ("merge", "compare", "run")]
    assert {str(file): found for file in with_models if (found := partly_matched(file.read_text()))} == {}


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


def test_no_function_changes_a_variable_of_its_module() -> None:
    nodes = [(file.name, node) for file in SOURCES for node in ast.walk(ast.parse(file.read_text()))]
    assert [(name, node.names) for name, node in nodes if isinstance(node, ast.Global)] == []


def holds_gradients_off_over_a_yield(source: str) -> list[str]:
    """Returns the blocks without gradients that a generator leaves by `yield`.

    Gradients stay off for whoever took the value, and for good when nobody takes the next one.
    """
    found = []
    for block in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.With)):
        managers = " ".join(map(ast.unparse, block.items))
        yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(block))
        found += [managers] if yields and ("no_grad" in managers or "inference_mode" in managers) else []
    return found


def test_no_generator_leaves_gradients_off_for_others() -> None:
    assert holds_gradients_off_over_a_yield("def f():\n  with torch.no_grad():\n    yield 1") == ["torch.no_grad()"]
    assert {str(file): found for file in SOURCES if (found := holds_gradients_off_over_a_yield(file.read_text()))} == {}
