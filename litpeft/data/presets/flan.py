"""FLAN: 65 data sets of language tasks, put into ten templates each. https://arxiv.org/abs/2109.01652

Millions of rows. One task: preset:flan/train/samsum_10templates_train.jsonl
"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://Muennighoff/flan",
    licence="Apache 2.0 for the templates; each of the 65 sets has its own",
    about="65 sets of language tasks in templates: millions of rows",
    row={"inputs": "...", "targets": "...", "task": "samsum_10templates"},
    columns={"user": "inputs", "assistant": "targets"},
)
