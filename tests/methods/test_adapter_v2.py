"""LLaMA-Adapter V2 against the paper's formula, written out on the weights of a transformers Llama."""

import pytest
import torch
from conftest import TINY, folded, make_folder
from safetensors.torch import load_file, save_file
from test_adapter import pair

from litpeft.methods.adapter_v2 import AdapterV2, ScaleBias
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.multi_head import Sdpa

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))


class PaperLinear(torch.nn.Module):
    """s * (W x + b + bias) with the paper's own factor s, which starts at one."""

    def __init__(self, linear: torch.nn.Linear, slot: ScaleBias):
        super().__init__()
        self.linear = linear
        self.s, self.bias = (torch.nn.Parameter(x.detach().clone()) for x in (1 + slot.scale, slot.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = 0 if self.linear.bias is None else self.linear.bias
        return self.s * (torch.einsum("...i,oi->...o", x, self.linear.weight) + own + self.bias)


def move(model: GPT) -> dict[str, ScaleBias]:
    """Gives scales and biases random values, as if trained; returns their Deltas by the name of their linear."""
    torch.manual_seed(6)
    slots = {n.removesuffix(".slot.adapter_v2"): m for n, m in model.named_modules() if isinstance(m, ScaleBias)}
    for slot in slots.values():
        torch.nn.init.normal_(slot.scale, std=0.2)
        torch.nn.init.normal_(slot.bias, std=0.2)
    return slots


@pytest.fixture(scope="module", params=["no biases", "biases"])
def folder(request, tmp_path_factory):
    given = {"attention_bias": True, "mlp_bias": True} if request.param == "biases" else {}
    folder = make_folder(tmp_path_factory.mktemp("models") / "either", **given)
    tensors = load_file(folder / "model.safetensors")
    biases = {name: torch.randn_like(x) * 0.2 for name, x in tensors.items() if name.endswith(".bias")}
    save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_logits_and_gradients_equal_the_papers_formula(folder) -> None:
    ours, theirs, cores = pair(folder, AdapterV2(prompt_length=5))
    names, slots, pairs = NameMap(*read_config(folder)), move(ours), []
    for name, slot in slots.items():
        module = names.file_name(f"{name}.weight").removesuffix(".weight").replace("self_attn", "self_attn.attn")
        paper = PaperLinear(theirs.get_submodule(module), slot)
        theirs.set_submodule(module, paper)
        pairs += [(slot.scale, paper.s), (slot.bias, paper.bias)]
    pairs += [pair for core, paper in cores for pair in ((core.prompt, paper.prompt), (core.gate, paper.gate))]
    pairs += [
        (block.norm1.weight, theirs.model.layers[i].input_layernorm.weight) for i, block in enumerate(ours.blocks)
    ]
    assert len(pairs) == 2 * 14 + 2 * 2 + 2
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    for logits in (want, got):
        (logits * weight).sum().backward()
    for own, other in pairs:
        assert (own.grad - other.grad).abs().max() <= 1e-10 * other.grad.abs().max()


def test_all_but_the_prompts_folds(folder) -> None:
    model = build(folder, torch.float64, AdapterV2()).eval()
    move(model)
    for block in model.blocks:
        block.attn.core = Sdpa()
        torch.nn.init.normal_(block.norm1.weight)
    plain = build(folder, torch.float64).eval()
    for name, tensor in folded(model).items():
        module, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(module), leaf, torch.nn.Parameter(tensor))
    want = model(IDS)
    assert (want - plain(IDS)).abs().max() <= 1e-10 * want.abs().max()
    assert (want - build(folder, torch.float64)(IDS)).abs().max() > 0.1 * want.abs().max()


def test_weight_decay_pulls_towards_the_base_and_not_to_zero(tiny_folder) -> None:
    linear = build(tiny_folder, torch.float64, AdapterV2()).blocks[0].mlp.up
    torch.nn.init.normal_(linear.slot.adapter_v2.scale)
    torch.nn.init.normal_(linear.slot.adapter_v2.bias)
    x = torch.randn(8, 64, dtype=torch.float64)
    optimizer = torch.optim.AdamW(linear.slot.adapter_v2.parameters(), lr=0.1, weight_decay=1.0)
    start = (linear(x) - linear.base(x)).norm()
    for _ in range(100):
        for p in linear.slot.adapter_v2.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert (linear(x) - linear.base(x)).norm() < 1e-3 * start


def test_a_factor_is_not_rounded_to_bfloat16(tiny_folder) -> None:
    linear = build(tiny_folder, torch.bfloat16, AdapterV2()).blocks[0].mlp.up
    torch.nn.init.normal_(linear.slot.adapter_v2.scale, std=0.02)
    y = torch.randn(2000, 112).bfloat16()
    delta, half = linear.slot.adapter_v2, 2.0**-8  # largest rounding of a result
    exact = y.double() * (1 + delta.scale.detach().double())
    off, cast = (
        float(((result.detach().double() - exact) / exact).abs().max())
        for result in (linear.slot(y, y, linear, None), y * (1 + delta.scale).bfloat16())
    )
    assert off <= 1.1 * half
    assert cast > 1.8 * half


def test_it_trains_prompts_scales_biases_and_norms(tiny_folder) -> None:
    model = build(tiny_folder, torch.bfloat16, AdapterV2(targets=("*.attn.q", "head")))
    names = {name for name in trainable(model) if name.startswith("blocks.1.") or "." not in name.partition(".")[2]}
    attn = {f"blocks.1.attn.core.adapter.{name}" for name in ("prompt", "gate")}
    attn |= {f"blocks.1.attn.q.slot.adapter_v2.{name}" for name in ("scale", "bias")}
    assert names == attn | {"blocks.1.norm1.weight", "blocks.1.norm2.weight", "norm.weight"}
    assert {"head.slot.adapter_v2.scale", "head.slot.adapter_v2.bias"} <= set(trainable(model))
