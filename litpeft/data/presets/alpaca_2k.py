"""2,000 rows of Alpaca, for trials: the set that Lit-GPT calls Alpaca-2k."""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://mhenrichsen/alpaca_2k_test",
    licence="Apache 2.0 says the repository; CC BY-NC 4.0 say Alpaca's authors",
    about="2,000 rows of Alpaca, for trials",
    row={"instruction": "...", "input": "...", "output": "...", "text": "..."},
)
