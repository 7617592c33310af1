"""Databricks' Dolly: 15,011 instructions that employees wrote and answered; `context` is a passage to read."""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://databricks/databricks-dolly-15k",
    licence="CC BY-SA 3.0",
    about="15,011 instructions, written and answered by people",
    row={"instruction": "...", "context": "...", "response": "...", "category": "open_qa"},
)
