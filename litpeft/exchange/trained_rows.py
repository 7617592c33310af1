"""How the rows of a run were read: its data.format and data.columns, for commands that are told neither of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from litpeft.core.errors import ModelError
from litpeft.core.terminal import tell
from litpeft.data.formats import FORMATS
from litpeft.data.formats.columns import mapped
from litpeft.data.sources import Source
from litpeft.exchange.result import Run


class Shaped(Protocol):
    """Settings that may say the shape of a row."""

    format: str
    columns: dict[str, str] | None


def shape_of(settings: Shaped, run: Run | None, sources: Sequence[Source], to_answer: bool = False) -> dict[str, Any]:
    """Returns `format` and `columns`: as the settings say, else as the run's were, if these rows have them.

    A preset's rows are read as the preset says. What is taken over is told.
    """
    said = {"format": settings.format, "columns": settings.columns}
    if run is None or settings.columns or settings.format != "auto" or any(source.preset for source in sources):
        return said
    then = _of_run(run.place / "run.yaml")
    row = next((record.value for source in sources for record in source.records("line") if not record.problem), None)
    if columns := then["columns"]:
        text = f"columns {json.dumps(columns, ensure_ascii=False)}"
        fits = mapped(columns).fits(row, to_answer)
    elif then["format"] != "auto":
        text, form = f"format {then['format']}", FORMATS[then["format"]]
        fits = isinstance(row, dict) and (form.key in row if to_answer else form.fits(row))
    else:
        return said
    if fits:
        tell(f"{text}, as in the training of {run.place}")
        return then
    tell(f"the training of {run.place} had {text}; these rows have other keys, so it is not taken over")
    return said


def _of_run(path: Path) -> dict[str, Any]:
    """Returns format and columns as run.yaml has them; auto and none where there is no such file."""
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        facts = {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"cannot be read: {error}", where=path) from None
    data = facts.get("data") if isinstance(facts, dict) else None
    data = data if isinstance(data, dict) else {}
    columns, name = data.get("columns"), data.get("format", "auto")
    try:
        if columns is not None:
            mapped(columns, "data.columns")
        if name not in ("auto", *FORMATS):
            raise ValueError(f"data.format must be auto or one of {', '.join(FORMATS)}, got {name!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(str(error), where=path, hint="say --columns or --format") from None
    return {"format": name, "columns": columns}
