"""UltraChat 200k: chats of several turns by ChatGPT, filtered for Zephyr. https://arxiv.org/abs/2305.14233"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://HuggingFaceH4/ultrachat_200k",
    licence="MIT",
    about="207,865 chats of several turns; 23,110 held out",
    row={"prompt": "...", "prompt_id": "...", "messages": [{"content": "...", "role": "user"}]},
    train="train_sft",
    held_out="test_sft",
)
