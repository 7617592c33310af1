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


def jsonable(value: object) -> object:
    """Returns `value` with lists for tuples, which JSON and YAML do not have."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value
