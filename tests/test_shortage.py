"""What a run says at its start that it will need of a GPU, and what it counts."""

import re

import pytest
import torch
from model_switches import CONFIG

from litpeft.core.precision import PRECISIONS
from litpeft.data.settings import Data
from litpeft.methods.lora import LoRA
from litpeft.model.config import ModelConfig
from litpeft.model.delta import attach
from litpeft.model.gpt import GPT
from litpeft.model.quantize.quantized import store
from litpeft.train.micro_tokens import SHARE
from litpeft.train.settings import Base, Finetune, Train
from litpeft.train.shortage import Shortage

BF16 = PRECISIONS["bf16-true"]
SIZES = {"vocab_size": 128256, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
LLAMA_8B = ModelConfig(**SIZES, d_ff=14336, max_positions=131072)


def told_of(config: ModelConfig, storage: str | None = None, double: bool = True, **train) -> Shortage:
    """Returns what is said of a run of LoRA on a GPU with this model and storage, in bf16-true."""
    settings = Finetune(Base("b", quantize=storage, double_quantize=double), Data("d"), "o", Train(**train))
    with torch.device("meta"):
        shapes = GPT(config)
        if storage is not None:
            store(shapes, storage, double, BF16.weights)
        attach(shapes, LoRA())
    return Shortage(settings, LoRA(), shapes, BF16, longest=512, gpu=True)


@pytest.mark.parametrize(
    ("storage", "double"), [("nf4", True), ("nf4", False), ("int8", True), ("int4", True), ("fp8", True)]
)
def test_packed_weights_are_counted_in_their_own_types(storage: str, double: bool) -> None:
    told = told_of(CONFIG, storage, double)
    packed = sum(t.nbytes for m in told.shapes.modules() if hasattr(m, "packed_names") for t in m.packed().values())
    rest = [p for name, p in GPT(CONFIG).named_parameters() if "norm" in name or "embed" in name or "head" in name]
    assert told.frozen() == packed + 2 * sum(p.numel() for p in rest)


def test_a_run_says_at_its_start_what_share_of_the_gpu_it_will_need() -> None:
    told = told_of(LLAMA_8B, micro_tokens=8192, batch_size=16)
    needed = sum(told.held().values())
    said = told.expected("NVIDIA H200", int(140e9), int(150e9))
    share = f"{needed / 150e9:.0%} of the 150.0 GB of NVIDIA H200"
    assert said == f"memory      about {needed / 1e9:.1f} GB, {share}, with 8,192 tokens a pass"
    short = told.expected("NVIDIA L4", int(22e9), int(24e9))
    assert short.startswith(f"memory      about {needed / 1e9:.1f} GB, {needed / 24e9:.0%} of the 24.0 GB of NVIDIA L4")
    assert "; 22.0 GB are free; train.activation_checkpointing " in short


@pytest.mark.parametrize("free", [25e9, 30e9, 100e9])
def test_where_the_tokens_of_a_pass_are_left_open_they_are_as_many_as_fit(free: float) -> None:
    told = told_of(LLAMA_8B, batch_size=16)
    said = told.expected("a card", int(free), int(free))
    percent, tokens = re.search(r"(\d+)% of .+ with ([\d,]+) tokens", said).groups()
    assert int(percent) <= 100 * SHARE
    assert (tokens == "8,192") == (free == 100e9)


@pytest.mark.parametrize(
    ("storage", "mode", "measured"), [(None, "none", 41.6), ("nf4", "none", 31.4), (None, "block", 21.5)]
)
def test_eight_billion_weights_need_what_was_measured_on_a_gpu(storage: str | None, mode: str, measured: float) -> None:
    """The figures, in GB, are those of an H200 in tutorials/performance.md."""
    told = told_of(LLAMA_8B, storage, micro_tokens=8192, batch_size=16, activation_checkpointing=mode)
    assert sum(told.held().values()) / 1e9 == pytest.approx(measured, rel=0.03)
