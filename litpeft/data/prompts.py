"""Prompts from a file or from standard input, and the file for their answers."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, DataError, counted, quoted, some
from litpeft.core.terminal import tell
from litpeft.data.formats import QUESTIONS, alpaca, keys
from litpeft.data.formats.turn import Turn, text
from litpeft.data.sources import Record, records


@dataclass(frozen=True)
class Prompt:
    """A row to answer."""

    row: dict[str, Any]  # as it was read
    content: str | list[Turn]  # raw text, or a conversation that ends with the user
    where: str  # file:line


def read_prompts(path: Path, raw: bool) -> list[Prompt]:
    """Returns the prompts of a .json, .jsonl or .txt file; names the first row that cannot be used."""
    prompts: list[Prompt] = []
    wrong: list[tuple[str, str]] = []
    for record in lines(path) if path.suffix == ".txt" else records(path):
        try:
            if record.problem:
                raise ValueError(record.problem)
            prompts.append(Prompt(record.value, content(record.value, raw), record.where))
        except ValueError as error:
            wrong.append((record.where, str(error)))
    if wrong:
        more = f" (and {counted(len(wrong) - 1, 'more bad row')})" if len(wrong) > 1 else ""
        raise DataError(wrong[0][1] + more, where=wrong[0][0])
    if not prompts:
        raise DataError("the file holds no prompts", where=path)
    return prompts


def lines(path: Path) -> Iterator[Record]:
    """Yields the lines of a text file that are not blank, as rows with a `prompt`."""
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    for number, line in enumerate(raw.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            if line.strip():
                yield Record(where, {"prompt": line.decode().removesuffix("\r")})
        except UnicodeDecodeError as error:
            yield Record(where, problem=f"not UTF-8 at byte {error.start + 1}")


def content(row: Any, raw: bool) -> str | list[Turn]:
    """Returns the prompt of a row: raw text, or messages; raises ValueError if it has none, or several."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    if "answer" in row:
        raise ValueError('the row has a key "answer", where its answer would be written; rename it')
    kinds = [key for key in ("prompt", *QUESTIONS) if key in row]
    if len(kinds) != 1:
        got = some([quoted(key) for key in row]) or "no key"
        raise ValueError(f"a row has one of {', '.join(('prompt', *QUESTIONS))}; this one has {got}")
    if raw:
        for key in (*QUESTIONS, *alpaca.ASKED):
            if key in row:
                raise ValueError(f"raw continues the text in `prompt`; this row has {key}")
        keys.refuse(row)
        return text(row, "prompt", "prompt", empty=False)
    return alpaca.asked(row, "prompt") if kinds == ["prompt"] else QUESTIONS[kinds[0]].asked(row)


def unread(prompts: list[Prompt]) -> Counter[str]:
    """Returns the keys that have no effect on the answers, with their number of rows."""
    found: Counter[str] = Counter()
    for row in (prompt.row for prompt in prompts):
        known = next((one for key, one in QUESTIONS.items() if key in row), alpaca)
        found.update(known.unread(row, to_answer=True))
    return found


def typed_prompt(typed: str | None, raw: bool) -> Prompt:
    """Returns the prompt of the command line; of standard input if it is `-` or missing."""
    where = "prompt" if typed not in (None, "-") else "standard input"
    if where != "prompt" and sys.stdin.isatty():
        tell("type the prompt; Ctrl-D on a line of its own ends it")
    try:
        row = {"prompt": typed if where == "prompt" else sys.stdin.read().removesuffix("\n")}
        row["prompt"].encode()
        return Prompt(row, content(row, raw), where)
    except UnicodeError as error:  # standard input, or the terminal, has another encoding
        raise DataError(f"this is not UTF-8: {error}", where=where) from None
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None


def new_file(name: str | None) -> Path | None:
    """Returns the path of a file that can be written and does not exist yet."""
    if name is None:
        return None
    path = Path(name)
    try:
        taken = path.exists()
    except OSError as error:  # the name is too long, say
        raise ConfigError(f"this can be no file: {error.strerror}", where=name) from None
    if taken:
        raise ConfigError("the output exists", where=name, hint="name another, or remove it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path.parent} is no folder that can be written to", where=name)
    return path
