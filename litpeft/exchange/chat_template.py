"""The chat template of a run in the files that are made of it."""

from pathlib import Path

from litpeft.core.json import read_optional, write_json
from litpeft.data.templates import ChatTemplate

FILE = "chat_template.jinja"


def write_template(folder: Path, template: ChatTemplate) -> None:
    """Writes a run's template into a model's folder, where it is not what the folder has from the base."""
    if template.is_models_own:
        return
    (folder / FILE).write_text(template.exported, encoding="utf-8", newline="")
    config = folder / "tokenizer_config.json"
    told = read_optional(config)
    if "chat_template" in told:  # some programs read this one only
        write_json(config, told | {"chat_template": template.exported})


def write_beside(folder: Path, template: ChatTemplate) -> str:
    """Writes a run's template beside an adapter, whatever it is; returns what to say of it."""
    (folder / FILE).write_text(template.exported, encoding="utf-8", newline="")
    return "" if template.is_models_own else f"; the base's chat template is another one: {FILE} has the run's"
