"""Activation checkpointing in families whose blocks are not those of Llama: all modes learn the same bits."""

from pathlib import Path

import pytest
import torch
from test_recompute import assert_modes_agree, made
from tiny_families import MODELS, make_family

from litpeft.methods.lora import LoRA

# parallel, one norm, two norms after, scores with a cap, sinks, experts, latent, norms of heads, no gate, shared keys
CHOSEN = ["neox", "phi", "olmo2", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "qwen3", "starcoder2", "gemma4_text"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in CHOSEN else pytest.mark.slow) for n in MODELS])
def test_all_modes_learn_the_same_bits(name: str, tmp_path: Path) -> None:
    make_family(tmp_path, name)
    norms = () if name == "olmo" else ("*norm*",)  # whose norms have no weights
    assert_modes_agree(made(tmp_path, torch.float32, LoRA(rank=4, dropout=0.2, unfreeze=norms)))
