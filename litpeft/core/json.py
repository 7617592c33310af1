"""Reads JSON files that hold an object."""

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
        raise ModelError(f"there is no {what}", where=str(path), hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{what} cannot be read: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} must be a JSON object, got {type(value).__name__}", where=str(path))
    return value


def read_shards(path: Path, ending: str) -> dict[str, str]:
    """Returns tensor -> file from the index of a model's shards; all must be files of its folder with this ending."""
    placed = read_json(path, "index of the shards").get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        hint = "the index is damaged: choose another model or revision"
        raise ModelError("weight_map must map each tensor to a file name", where=str(path), hint=hint)
    for file in sorted(set(placed.values())):
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(ending):
            what = f"names {file[:200]!r}; only a *{ending} file of the same folder is allowed"
            raise ModelError(what, where=str(path), hint="do not trust this model")
    return placed


def jsonable(value: object) -> object:
    """Returns `value` with lists for tuples, which JSON and YAML do not have."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value
