"""Stanford's Alpaca: 52,002 instructions, answered by text-davinci-003. Many answers are wrong; see alpaca_cleaned."""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://tatsu-lab/alpaca",
    licence="CC BY-NC 4.0",
    about="52,002 instructions, answered by text-davinci-003",
    row={"instruction": "...", "input": "...", "output": "...", "text": "..."},  # text: all three in Alpaca's template
)
