"""Compiled blocks of families that are built otherwise than Llama compute the same loss and gradients."""

import shutil

import pytest
import torch
from test_model import FAMILY_CASES
from tiny_families import make_family

from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.train.compiled import compile_blocks

FULL = ["full_attention"] * 2
SMALL = {  # few layers and experts: each takes seconds to compile; the first layer runs as it is
    "gemma4_text": {"num_hidden_layers": 2, "layer_types": FULL, "num_kv_shared_layers": 1},
    "deepseek_v3": {
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
    },
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "linear_attention"]},
}
IDS = torch.randint(2, 257, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler")
@pytest.mark.parametrize("name", SMALL)
def test_compiled_blocks_compute_the_same_loss_and_gradients(name: str, tmp_path) -> None:
    make_family(tmp_path, name, torch.float64, **FAMILY_CASES[name] | SMALL[name])
    found = []
    for compiled in (False, True):
        torch.manual_seed(2)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = build(tmp_path, torch.float64, LoRA(rank=2, targets=("*.attn.*",)))
        for key, parameter in trainable(model).items():
            torch.nn.init.normal_(parameter, std=0.1) if key.endswith("lora.B") else None
        if compiled:
            compile_blocks(model, torch.device("cpu"))
        loss = model(IDS, Context.packed((15, 25), IDS.device, None), at=torch.arange(39), targets=IDS[0, 1:])
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in trainable(model).values())])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    largest = max(float(tensor.abs().max()) for tensor in found[0])
    assert all((a - b).abs().max() <= 1e-9 * largest for a, b in zip(*found, strict=True))
