"""Answers kept on disk while the others are written, so that an interrupt, an error or a kill loses none."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, counted
from litpeft.core.folders import disk_fault
from litpeft.core.terminal import tell

Keep = Callable[[Mapping[str, Any]], None]


def line(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of JSON Lines."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


@contextmanager
def kept(output: Path | None) -> Iterator[Keep]:
    """Yields a function that adds an answered row to a file beside `output`, which the block writes at its end.

    The file is called out.part where `output` is out.jsonl. Its rows stand as they were answered: one model after the
    other, the longest prompts first. It is removed if the block succeeds; else the user is told what it keeps.
    """
    if output is None:
        yield lambda row: None
        return
    part = output.with_suffix(".part")  # no longer than `output`, whose name may be as long as a name can be
    if part.exists():
        what = f"{part} holds answers of a run that was stopped"
        raise ConfigError(what, where="output", hint="move or remove it, or name another output")
    count = 0

    def keep(row: Mapping[str, Any]) -> None:
        nonlocal count
        try:
            with open(part, "a", encoding="utf-8") as handle:
                handle.write(line(row))
        except OSError as error:
            raise disk_fault(error, part) or error from None
        count += 1

    try:
        yield keep
    except BaseException:
        if count:
            tell(f"{counted(count, 'answer')} kept in {part}, in the order they were written; {output} was not made")
        raise
    part.unlink(missing_ok=True)
