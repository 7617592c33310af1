"""Switching between runs 200 times: updates in slots leave the base bit for bit; in its weights they leave a trace."""

import pytest
import torch

from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import without_delta

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(("dtype", "drift"), [(torch.float32, 6.8e-7), (torch.bfloat16, 1.5e-2), (torch.float16, 5e-3)])
def test_weights_that_updates_are_added_to_and_taken_from_drift(dtype: torch.dtype, drift: float) -> None:
    """What switching would cost without slots, relative to the weight's norm: within a factor of 4 of known figures."""
    torch.manual_seed(0)
    base = (torch.randn(256, 256) / 16).to(dtype)
    updates = [(torch.randn(256, 8) @ torch.randn(8, 256) / 200).to(dtype) for _ in range(2)]
    weight = base.clone()
    for turn in range(200):
        weight += updates[turn % 2]
        weight -= updates[turn % 2]
    left = float((weight.double() - base.double()).norm() / base.double().norm())
    assert drift / 4 < left < drift * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_updates_in_slots_are_switched_without_a_trace(tiny_folder, dtype: torch.dtype) -> None:
    base = build(tiny_folder, dtype)
    model = build(tiny_folder, dtype, LoRA(rank=4)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer, plain = model(IDS), base(IDS)
    assert not torch.equal(answer, plain)
    for _ in range(200):
        with without_delta(model):
            pass
    with without_delta(model):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), answer)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
