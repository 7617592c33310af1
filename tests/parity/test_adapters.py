"""Bottleneck adapters of the `adapters` package: its weights in ours give its logits, its gradients and its steps.

Its parallel adapters are left out: they read the residual stream, where those of the paper read the MLP's input.
"""

import pytest
import torch
import torch.nn as nn
from conftest import TINY, in_float64

from litpeft.methods.bottleneck import KINDS, Bottleneck
from litpeft.model.build import build
from litpeft.model.delta import trainable

adapters = pytest.importorskip("adapters", reason="adapters is installed by `bash scripts/test.sh --parity`")
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
NAMES = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
PLACES = {"after_attn": "attention_adapters", "after_mlp": "output_adapters"}
CONFIGS = {
    "houlsby": lambda **more: adapters.DoubleSeqBnConfig(**more),
    "pfeiffer": lambda **more: adapters.SeqBnConfig(original_ln_before=False, **more),
}


def theirs(folder, config) -> nn.Module:
    model = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    adapters.init(model)
    model.add_adapter("it", config=config)
    model.set_active_adapters("it")
    model.train_adapter("it")
    return model.double().eval()


def compare_steps(ours: nn.Module, other: nn.Module, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Compares logits and gradients, then what 20 steps of AdamW make of both."""
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=1e-3) for i in (0, 1)]
    for step in range(20):
        got, want = ours(IDS), other(IDS).logits
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()
        for logits in (got, want):
            logits.square().mean().backward()
        if not step:
            for own, its in pairs:
                assert (own.grad - its.grad).abs().max() <= 1e-8 * its.grad.abs().max()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", CONFIGS)
def test_bottlenecks_learn_the_same(tiny_folder, kind: str) -> None:
    other = theirs(tiny_folder, CONFIGS[kind](reduction_factor=8, non_linearity="relu"))
    ours = build(tiny_folder, torch.float64, Bottleneck(kind=kind, reduction_factor=8, activation="relu"))
    pairs = []
    torch.manual_seed(1)
    for block, layer in zip(ours.blocks, other.model.layers, strict=True):
        for place in KINDS[kind]:
            delta = getattr(block, place).deltas["bottleneck"]
            its = getattr(layer, PLACES[place]).adapters["it"]
            for key, name in NAMES.items():
                pairs.append((getattr(delta, key), its.get_parameter(name)))
                nn.init.normal_(pairs[-1][1], std=0.2)
                pairs[-1][0].data = pairs[-1][1].detach().clone()
    compare_steps(ours.eval(), other, pairs)
    assert len(pairs) == len(trainable(ours))
