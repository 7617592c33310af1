"""Prompts from a file or from standard input, and the file for their answers."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, DataError, counted
from litpeft.core.terminal import tell
from litpeft.data.formats import FORMATS, QUESTIONS, Format, chosen, keys
from litpeft.data.formats.pair import BESIDE
from litpeft.data.formats.turn import Turn, text
from litpeft.data.readers import kind
from litpeft.data.sources import find_measured


@dataclass(frozen=True)
class Prompt:
    """A row to answer."""

    row: dict[str, Any]  # as it was read
    content: str | list[Turn]  # raw text, or a conversation that ends with the user
    where: str  # file:line
    unread: frozenset[str] = frozenset()  # keys without effect


def read_prompts(path: str, raw: bool, format: str = "auto", columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Returns the prompts of files, of which each line of plain text is one; names the first row that cannot be used.

    `format` and `columns` say the shape of a row, as data.format and data.columns do.
    """
    sources = find_measured(path)
    own = next((source.preset.columns for source in sources if source.preset and format == "auto"), None)
    choose = chosen(format, columns or own, to_answer=True)
    prompts: list[Prompt] = []
    wrong: list[tuple[str, str]] = []
    of_lines = {kind(source.path)[0] for source in sources} == {".txt"}
    for record in (record for source in sources for record in source.records("line")):
        try:
            if record.problem:
                raise ValueError(record.problem)
            row = {"prompt": record.value["text"]} if of_lines else record.value
            _, form = choose(row)
            asked = content(row, raw, form)
            prompts.append(Prompt(row, asked, record.where, frozenset(form.unread(row, to_answer=True))))
        except ValueError as error:
            wrong.append((record.where, str(error)))
    if wrong:
        more = f" (and {counted(len(wrong) - 1, 'more bad row')})" if len(wrong) > 1 else ""
        raise DataError(wrong[0][1] + more, where=wrong[0][0])
    if not prompts:
        raise DataError("the file holds no prompts", where=path)
    return prompts


def content(row: Any, raw: bool, form: Format) -> str | list[Turn]:
    """Returns the prompt of a row: raw text, or messages; raises ValueError if it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    if raw:
        for key in (*QUESTIONS, *BESIDE):
            if key in row and key != "prompt":
                raise ValueError(f"raw continues the text in `prompt`; this row has {key}")
        keys.refuse(row)
        return text(row, "prompt", "prompt", empty=False)
    return form.asked(row)


def answer_key(prompts: list[Prompt], name: str) -> str:
    """Returns the key under which answers are written: `name`, or another one if rows have it already."""
    taken = {key for prompt in prompts for key in prompt.row}
    return next(key for key in chain([name], (f"{name}_{number}" for number in count(2))) if key not in taken)


def unread(prompts: list[Prompt]) -> Counter[str]:
    """Returns the keys that have no effect on the answers, with their number of rows."""
    return Counter(key for prompt in prompts for key in prompt.unread)


def typed_prompt(typed: str | None, raw: bool) -> Prompt:
    """Returns the prompt of the command line; of standard input if it is `-` or missing."""
    where = "prompt" if typed not in (None, "-") else "standard input"
    if where != "prompt" and sys.stdin.isatty():
        tell("type the prompt; Ctrl-D on a line of its own ends it")
    try:
        row = {"prompt": typed if where == "prompt" else sys.stdin.read().removesuffix("\n")}
        row["prompt"].encode()
        return Prompt(row, content(row, raw, FORMATS["prompt_completion"]), where)
    except UnicodeError as error:  # standard input, or the terminal, has another encoding
        raise DataError(f"this is not UTF-8: {error}", where=where) from None
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None


def new_file(name: str | None, suffix: str = "") -> Path | None:
    """Returns the path of a file that can be written and does not exist yet; its name must end in `suffix`."""
    if name is None:
        return None
    path = Path(name)
    if not path.name.endswith(suffix):  # commands that read rows go by the name
        hint = f"call it {path.stem}{suffix}"
        raise ConfigError(f"rows are written as JSON Lines, to a file that ends in {suffix}", where=name, hint=hint)
    try:
        taken = path.exists()
    except OSError as error:  # the name is too long, say
        raise ConfigError(f"this can be no file: {error.strerror}", where=name) from None
    if taken:
        raise ConfigError("the output exists", where=name, hint="name another, or remove it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path.parent} is no folder that can be written to", where=name)
    return path
