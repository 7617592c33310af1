"""LongForm: long texts written by people, each with an instruction made for it. https://arxiv.org/abs/2304.08460

`input` is the instruction. The set has rows of its own for validation and test.
"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://akoksal/LongForm",
    licence="MIT, with OpenAI's terms for the instructions",
    about="23,652 long texts with instructions made for them",
    row={"input": "...", "output": "...", "source": "Wikipedia", "subset": "..."},
    columns={"user": "input", "assistant": "output"},
)
