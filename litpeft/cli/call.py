"""The commands in Python: `litpeft.run("finetune lora", base={"dir": "checkpoints/x"}, ...)`."""

import json
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from litpeft.cli import dispatch, settings_of
from litpeft.cli.commands import COMMANDS
from litpeft.core.errors import ConfigError, nearest


def run(command: str, **keys: Any) -> None:
    """Does what `litpeft COMMAND` does in a terminal; `keys` are its options, nested as in a YAML file.

    Errors that the command would print are raised: litpeft.core.errors.UserError. A run that a signal stopped, and
    one on several devices that failed, raise SystemExit with the command's exit code.
    """
    if command not in COMMANDS:
        hint = "litpeft --help lists the commands"
        raise ConfigError(f"there is no command {command!r}{nearest(command, list(COMMANDS))}", hint=hint)
    cls = settings_of(command, COMMANDS[command])
    alone = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
    alone = [] if COMMANDS[command].in_yaml else [name for name in alone if name in keys]
    groups = {one.name for one in fields(cls) if is_dataclass(one.type)} | (
        {"method"} if COMMANDS[command].method else set()
    )
    words = [*command.split(), *(_word(keys.pop(name)) for name in alone)]
    words += [f"--{key}={_word(value)}" for key, value in _leaves(keys, groups)]
    try:
        dispatch(words, [], time.perf_counter())
    except SystemExit as stop:
        if stop.code:
            raise


def _leaves(keys: Mapping[str, Any], groups: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yields the options with their values: those of a group by dotted names."""
    for key, value in keys.items():
        inner = value if isinstance(value, Mapping) and key in groups else None
        yield from [(key, value)] if inner is None else ((f"{key}.{name}", one) for name, one in inner.items())


def _word(value: Any) -> str:
    """Returns a value as it would be typed."""
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value, default=str)
