"""The text of `litpeft COMMAND --help`: an example, required options, the method, then each group of options."""

import json
import re
from argparse import Action
from shutil import get_terminal_size
from textwrap import wrap
from types import NoneType
from typing import Any, get_origin

from jsonargparse import ArgumentParser

from litpeft.core.kinds import alternatives, choices

COLUMN = 34  # where the descriptions begin; that of a longer option begins on the next line
VALUES = {int: "INTEGER", float: "NUMBER", tuple: "LIST", dict: "DICT"}


def wanted(argv: list[str], parser: ArgumentParser) -> str | None:
    """Returns the help that a command line asks for: "" for all of it, a group's name, or None."""
    groups = {f"--{name}.help": name for name in _titles(parser)}
    return next((groups.get(word, "") for word in argv if word in ("-h", "--help", *groups)), None)


def help_text(parser: ArgumentParser, group: str = "") -> str:
    """Returns the help of a command, or of one group of its options."""
    actions = [action for action in parser._actions if hasattr(action, "_typehint")]
    titles = _titles(parser)
    sections = {name: [action for action in actions if _group(action) == name] for name in titles}
    if group:
        return "\n".join(_section(f"{group}: {titles[group]}", sections[group])[1:]) + "\n"
    required = [action for action in actions if action.required or not action.option_strings]
    usage = f"usage: {' '.join([parser.prog, *map(_left, required)])} [options]"
    lines = [*wrap(usage, _width(), subsequent_indent=" " * 7), "", *wrap(parser.description, _width())]
    example = parser.epilog if len(parser.epilog) + 2 <= _width() else parser.epilog.replace(" --", " \\\n    --")
    lines += ["", "example:", *f"  {example}".split("\n"), *_section("required", required)]
    if "method" in titles:
        lines += _section(f"method: {titles.pop('method')}", sections["method"])
    lines += _section("options", [action for action in actions if not _group(action) and action not in required])
    lines += _row("--config FILE", "YAML file with any of these keys; options win over it.")
    lines += _row("--print_config", "Print all settings as YAML, and stop.")
    for name, title in titles.items():
        lines += _section(f"{name}: {title}", [action for action in sections[name] if action not in required])
    if sections:
        lines += ["", *wrap(f"One section only: {', '.join(f'--{name}.help' for name in sections)}.", _width())]
    return "\n".join(lines) + "\n"


def _titles(parser: ArgumentParser) -> dict[str, str]:
    """Returns the title of each group of options, by its name."""
    return {name: group.title for group in parser._action_groups for name in map(_group, group._group_actions) if name}


def _group(action: Action) -> str:
    return action.dest.rpartition(".")[0]


def _width() -> int:
    return max(60, min(120, get_terminal_size().columns))


def _section(title: str, actions: list[Action]) -> list[str]:
    rows = [line for action in actions for line in _row(_left(action), _text(action))]
    return ["", *wrap(title, _width()), *rows] if rows else []


def _left(action: Action) -> str:
    return f"--{action.dest} {_value(action)}" if action.option_strings else _value(action)


def _value(action: Action) -> str:
    """Returns the placeholder of an option's value: its choices, or its type."""
    if action._typehint is bool:
        return "[true|false]"
    named = choices(action._typehint)
    if named:
        return "|".join("null" if value is None else value for value in named)
    kinds = [part for part in alternatives(action._typehint) if part is not NoneType]
    kinds.sort(key=lambda kind: kind is not str)  # a text may stand for a list of it, say
    first = VALUES.get(get_origin(kinds[0]) or kinds[0]) or action.dest.rpartition(".")[2].upper()
    return "|".join([first, *(word for kind in kinds[1:] for word in choices(kind))])


def _text(action: Action) -> str:
    """Returns the option's description, with its default unless that is null or empty."""
    default: Any = action.default
    if action.required or default in (None, "", (), {}):
        return action.help
    shown = default if isinstance(default, str) else json.dumps(default)
    return f"{action.help} {shown if shown.startswith('[') else f'[{shown}]'}"


def _row(left: str, text: str) -> list[str]:
    """Returns the lines of an option: its description beside it, or below if it is too long."""
    if len(left) >= COLUMN - 2:
        return [*_between_choices(f"  {left}"), *beside("", text)]
    return beside(f"  {left}", text)


def _between_choices(line: str) -> list[str]:
    """Returns a line as so many as the terminal needs; a new one may begin after each |."""
    lines = [""]
    for part in re.split(r"(?<=\|)", line):
        if len(lines[-1] + part) > _width():
            lines.append(" " * 6)
        lines[-1] += part
    return lines


def beside(left: str, text: str, column: int = COLUMN) -> list[str]:
    """Returns lines with a text from a column on, and `left` before its first line."""
    first, *more = wrap(" ".join(text.split()), _width() - column, break_on_hyphens=False)
    return [f"{left:<{column}}{first}", *(" " * column + line for line in more)]
