"""Deita 10k: chats of ShareGPT, UltraChat and WizardLM, chosen for quality. https://arxiv.org/abs/2312.15685"""

from litpeft.data.presets.preset import Preset

PRESET = Preset(
    source="hf://HuggingFaceH4/deita-10k-v0-sft",
    licence="MIT",
    about="9,500 chats, chosen for quality; 500 held out",
    row={"prompt": "...", "prompt_id": "...", "messages": [{"content": "...", "role": "user"}]},
    train="train_sft",
    held_out="test_sft",
)
