"""GSM8K: 7,473 school problems, solved step by step; an answer ends in `#### 42`. https://arxiv.org/abs/2110.14168

Its 1,319 rows of test are not trained on: `litpeft evaluate RUN gsm8k` measures on them.
"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://openai/gsm8k:main",
    licence="MIT",
    about="7,473 school problems, solved step by step; 1,319 for the test",
    row={"question": "...", "answer": "...\n#### 42"},
)
