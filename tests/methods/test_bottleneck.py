"""Bottleneck adapters against their papers' figures, drawn into transformers' Llama."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, in_float64
from torch import Tensor
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.methods.bottleneck import KINDS, Bottleneck, BottleneckAdapter
from litpeft.model.build import build
from litpeft.model.delta import trainable

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
OF_KINDS = {"houlsby": "gelu", "pfeiffer": "relu", "lin": "relu", "parallel": "silu"}
ACTS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def paper(t: dict[str, Tensor], act: str, u: Tensor) -> Tensor:
    """Returns what an adapter adds for its input u."""
    return ACTS[act](u @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


def normed(t: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t["norm"] + t["norm_bias"]


def put_into(layer: nn.Module, kind: str, adapters: list[dict[str, Tensor]], act: str, scale: float) -> None:
    """Lets a layer of transformers' model have adapters where the paper draws them."""
    if kind in ("houlsby", "pfeiffer"):
        parts = ([layer.self_attn.o_proj] if kind == "houlsby" else []) + [layer.mlp]
        for part, t in zip(parts, adapters, strict=True):
            part.register_forward_hook(lambda module, args, y, t=t: y + scale * paper(t, act, y))
    elif kind == "parallel":
        layer.mlp.register_forward_hook(lambda module, args, y: y + scale * paper(adapters[0], act, args[0]))
    else:
        t = adapters[0]
        layer.register_forward_hook(lambda module, args, y: y + scale * paper(t, act, normed(t, y)))


@pytest.mark.parametrize(("kind", "act"), OF_KINDS.items())
def test_logits_and_gradients_equal_the_papers_formula(tiny_folder, kind: str, act: str) -> None:
    method = Bottleneck(kind=kind, activation=act, reduction_factor=8, scale=0.5)
    ours = build(tiny_folder, torch.float64, method).eval()
    torch.manual_seed(3)
    for parameter in trainable(ours).values():
        nn.init.normal_(parameter, std=0.3)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)).eval()
    pairs = []
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        found = [slot.deltas["bottleneck"] for slot in (getattr(block, place) for place in KINDS[kind])]
        copies = [{key: p.detach().clone().requires_grad_() for key, p in a.named_parameters()} for a in found]
        put_into(layer, kind, copies, act, 0.5)
        pairs += [(p, copy[key]) for a, copy in zip(found, copies, strict=True) for key, p in a.named_parameters()]
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert len(pairs) == {"houlsby": 16, "pfeiffer": 8, "lin": 12, "parallel": 8}[kind]
    assert all((own.grad - other.grad).abs().max() <= 1e-9 * other.grad.abs().max() for own, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_starts_at_the_base_and_its_upper_layer_learns_first(tiny_folder, kind: str, dtype) -> None:
    model = build(tiny_folder, dtype, Bottleneck(kind=kind))
    assert torch.equal(model(IDS), build(tiny_folder, dtype)(IDS))
    model(IDS).float().square().sum().backward()
    for delta in (m for m in model.modules() if isinstance(m, BottleneckAdapter)):
        assert not delta.down.grad.any()
        assert delta.up.grad.any()
        assert delta.up_bias.grad.any()


@pytest.mark.parametrize("settings", [{"kind": "other"}, {"reduction_factor": 0}, {"scale": 0.0}, {"activation": "x"}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        Bottleneck(**settings)


def test_an_adapter_without_an_inner_width_is_refused(tiny_folder) -> None:
    with pytest.raises(UserError, match="65 is more than 64, the width of this model"):
        build(tiny_folder, torch.float32, Bottleneck(reduction_factor=65))
