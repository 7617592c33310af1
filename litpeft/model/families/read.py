"""Reads the config.json of a Hugging Face folder as its family does."""

from pathlib import Path
from typing import Any

from litpeft.core.errors import ModelError
from litpeft.core.json import read_json
from litpeft.core.recognise import refuse_other
from litpeft.model.config import ModelConfig
from litpeft.model.families import FAMILIES, OTHERS, family


def read_config(folder: Path) -> tuple[str, ModelConfig]:
    """Returns the family's name (`llama`, ...) and the ModelConfig of a Hugging Face folder."""
    refuse_other(folder)
    path = folder / "config.json"
    return config_of(read_json(path, "config.json of a model"), str(path))


def config_of(hf: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """Returns what `read_config` does, for the contents of a config.json; `where` is for messages."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        why = f" ({OTHERS[name]})" if isinstance(name, str) and name in OTHERS else ""
        raise ModelError(f"model_type {name!r} is not supported{why}; litpeft has {', '.join(FAMILIES)}", where=where)
    try:
        return name, family(name).config(hf)
    except KeyError as error:
        raise ModelError(f"the key {error} is missing", where=where) from None
    except ValueError as error:
        raise ModelError(str(error), where=where) from None


def left_out(folder: Path) -> str:
    """Returns a part of a message: which sizes and switches a folder's config.json leaves out, and their defaults."""
    hf = read_json(folder / "config.json", "config.json of a model")
    keys = family(hf["model_type"]).Keys
    absent = [
        f"{field} (then {getattr(keys, field)})"
        for field, name, kind in keys.spelt(hf)
        if name not in hf and kind in (int, bool)
    ]
    return f", which leaves out {', '.join(absent)}," if absent else ""
