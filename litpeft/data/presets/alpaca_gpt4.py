"""Alpaca's instructions, answered by GPT-4. https://arxiv.org/abs/2304.03277"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://vicgalle/alpaca-gpt4",
    licence="CC BY-NC 4.0",
    about="Alpaca's 52,002 instructions, answered by GPT-4",
    row={"instruction": "...", "input": "...", "output": "...", "text": "..."},  # text: all three in Alpaca's template
)
