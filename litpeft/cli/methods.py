"""The command `litpeft methods`: all methods in a table, or one with its equation, its defaults and its options."""

import ast
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from litpeft.cli import COMMANDS, parse
from litpeft.cli.help import beside
from litpeft.core.errors import nearest, quoted
from litpeft.core.terminal import say
from litpeft.methods import METHODS, PRESETS

COLUMNS = "{:<13}{:<6}{:<8}{:<15}{:<12}"  # name, learning rate, whether it merges, its kind in peft, paper


@dataclass
class Methods:
    """List the finetuning methods, or show one: its equation, its paper, its defaults and its options."""

    name: str = "all"
    """The method to show; all lists them."""

    def __post_init__(self) -> None:
        if self.name not in ("all", *METHODS):
            raise ValueError(f"there is no method {quoted(self.name)}{nearest(self.name, list(METHODS))}")


def described(name: str) -> str:
    """Returns what the file of a method says of it; torch is not imported."""
    file = Path(find_spec(METHODS[name][0].partition(":")[0]).origin)
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def merges(name: str) -> str:
    """Returns whether `litpeft merge` folds the method's runs into their base."""
    return "no" if "not fold" in described(name) else "if all" if "Folds if" in described(name) else "yes"


def in_peft(name: str) -> str:
    """Returns the kind of adapter that a run of the method is for peft, with the method's defaults."""
    found = re.search(r"In peft: (\w+)", described(name))
    return found[1] if found else "no"


def methods(settings: Methods) -> None:
    """The command."""
    if settings.name != "all":
        return show(settings.name)
    width = len(COLUMNS.format("", "", "", "", ""))
    lines = [COLUMNS.format("method", "lr", "merges", "in peft", "arXiv") + "what trains"]
    for name, (_, text) in METHODS.items():
        paper = re.search(r"arxiv\.org/abs/([\d.]+\d)", described(name))[1]
        rate = f"{PRESETS[name]['train.lr']:.0e}".replace("e-0", "e-")
        lines += beside(COLUMNS.format(name, rate, merges(name), in_peft(name), paper), text, width)
    say("\n".join([*lines, "", "lr is the default of train.lr. `litpeft methods NAME` shows one with its options."]))


def show(name: str) -> None:
    """Prints a method's equation, paper and size, the defaults that are its own, and its options."""
    defaults = ", ".join(f"{key} {value}" for key, value in PRESETS[name].items())
    say(f"{name}: {METHODS[name][1]}\n\n{described(name)}\n\ndefaults of its own: {defaults}\n\noptions of")
    with suppress(SystemExit):
        parse(f"finetune {name}", COMMANDS[f"finetune {name}"], ["--method.help"])
