"""Options that are paths: `~` in them is the home folder, also where no shell has seen it, and none is empty."""

import os.path
from typing import Any

PATHS = (
    *("out", "base.dir", "data.path", "data.validation_path", "init_from", "ending.neutral"),  # of finetune
    *("path", "validation_path", "html", "json", "fix", "folder"),  # of data
    *("model", "also", "data", "input", "output", "shots_from", "task_folder", "neutral", "measured"),
    *("source", "run", "base", "a", "b"),
)


def expand_paths(settings: Any) -> None:
    """Expands `~` in the parsed options of a command; raises a ValueError for an empty path."""
    for key in PATHS:
        if key in settings:
            settings[key] = _expanded(settings[key], key)


def _expanded(value: Any, key: str) -> Any:
    """Returns a path, or several: in a list, or as the keys of a dict."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{key} must be a path, got ''")
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list | tuple):
        return type(value)(_expanded(one, key) for one in value)
    if isinstance(value, dict):
        return {_expanded(path, key): weight for path, weight in value.items()}
    return value  # none, or a group of options of this name
