"""LoRA of its authors' package: its weights in ours give its outputs, gradients, steps and merged weight."""

import pytest
import torch
import torch.nn as nn

from litpeft.methods.lora import LoRA
from litpeft.model.adopt import adopt
from litpeft.model.delta import trainable
from litpeft.model.fold import folds

lora = pytest.importorskip("loralib", reason="loralib is installed by `bash scripts/test.sh --parity`")


def test_a_network_learns_the_same() -> None:
    torch.manual_seed(0)
    other = nn.Sequential(lora.Linear(12, 20, r=4, lora_alpha=12), nn.ReLU(), lora.Linear(20, 6, r=4, lora_alpha=12))
    other = other.double()
    ours = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6)).double()
    ours.load_state_dict({key: value for key, value in other.state_dict().items() if "lora" not in key})
    adopt(ours, LoRA(rank=4, alpha=12.0, targets=("*",)))
    lora.mark_only_lora_as_trainable(other)
    own = {key.replace(".slot.lora.", ".lora_"): parameter for key, parameter in trainable(ours).items()}
    assert own.keys() == trainable(other).keys()
    for key, its in trainable(other).items():
        nn.init.normal_(its, std=0.3)
        own[key].data = its.detach().clone()
    x = torch.randn(9, 12, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(trainable(model).values(), lr=1e-2) for model in (ours, other)]
    for _ in range(20):
        got, want = ours(x), other(x)
        assert torch.allclose(got, want, atol=1e-10)
        for y in (got, want):
            y.square().sum().backward()
        assert all(torch.allclose(own[key].grad, its.grad, atol=1e-9) for key, its in trainable(other).items())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    other.eval()  # merges
    merged = {name: tensor for name, tensor, _ in folds(ours)}
    assert torch.allclose(merged["0.weight"], other[0].weight, atol=1e-10)
    assert torch.allclose(merged["2.weight"], other[2].weight, atol=1e-10)
