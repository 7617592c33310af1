"""Reads and writes JSON files that hold an object."""

import json
from pathlib import Path
from typing import Any

from litpeft.core.errors import ModelError


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Returns the JSON object in `path`; errors call the file `what`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "a model folder holds config.json, *.safetensors and tokenizer files; see `litpeft download --help`"
        raise ModelError(f"there is no {what}", where=path, hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{what} cannot be read: {error}", where=path) from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} must be a JSON object, got {type(value).__name__}", where=path)
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, an empty one if there is no such file."""
    return read_json(path, path.name) if path.is_file() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object for people to read, too."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_shards(path: Path, ending: str) -> dict[str, str]:
    """Returns tensor -> file from the index of a model's shards; all must be files of its folder with this ending."""
    placed = read_json(path, "index of the shards").get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        hint = "the index is damaged: choose another model or revision"
        raise ModelError("weight_map must map each tensor to a file name", where=path, hint=hint)
    for file in sorted(set(placed.values())):
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(ending):
            what = f"names {file[:200]!r}; only a *{ending} file of the same folder is allowed"
            raise ModelError(what, where=path, hint="do not trust this model")
    return placed


def jsonable(value: object) -> object:
    """Returns `value` with lists for tuples, which JSON and YAML do not have."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value
