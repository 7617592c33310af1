"""LoRA-FA against LoRA with a frozen first matrix: in peft, in what a layer keeps, and in what a run leaves."""

import pytest
import torch
from conftest import finetune
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file
from test_lora import IDS, pair

from litpeft.methods.combo import Combo
from litpeft.methods.lora import LowRank
from litpeft.methods.lora_fa import LoRAFA
from litpeft.model.build import build
from litpeft.model.slots import Linear


def test_logits_and_gradients_equal_those_that_pefts_lora_fa_trains_with(tiny_folder) -> None:
    lora, theirs = pair(tiny_folder, rslora=False)
    create_lorafa_optimizer(theirs, r=4, lora_alpha=20, lr=1.0)  # freezes A
    ours = build(tiny_folder, torch.float64, LoRAFA(rank=4, alpha=20)).eval()
    ours.load_state_dict({name.replace(".lora.", ".lora_fa."): tensor for name, tensor in lora.state_dict().items()})
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    layer = theirs.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    slot = ours.get_submodule("blocks.1.attn.v.slot.lora_fa")
    assert torch.allclose(slot.B.grad, layer.lora_B["default"].weight.grad, rtol=1e-9, atol=1e-12)
    assert slot.A.grad is layer.lora_A["default"].weight.grad is None


def kept(layer: Linear, x: torch.Tensor) -> int:
    """Returns the bytes that a layer keeps for the backward pass, parameters and what is cast of them left out."""
    own, sizes = {tuple(p.shape) for p in layer.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("frozen", "dropout", "floats"), [(True, 0.0, 64 * 8), (False, 0.0, 64 * (8 + 256)), (True, 0.1, 64 * (8 + 256))]
)
def test_a_layer_keeps_the_inner_activations_alone_unless_it_drops(frozen: bool, dropout: float, floats: int) -> None:
    layer = Linear(256, 192).requires_grad_(False)
    delta = LowRank(256, 192, 8, 2.0, dropout)
    delta.reset_parameters()
    delta.A.requires_grad_(not frozen)
    layer.slot.add("lora_fa", delta)
    assert kept(layer, torch.randn(1, 64, 256, requires_grad=True)) == 4 * floats


def test_a_run_saves_the_first_matrix_as_it_was_drawn(tiny_folder, tmp_path) -> None:
    short, long = (
        load_file(finetune(tiny_folder, tmp_path, "--train.epochs", str(n), out=f"{n}", method="lora_fa") / "final" /
                  "delta.safetensors")
        for n in (1, 3)
    )  # fmt: skip
    assert len(short) == 2 * 14
    assert all(torch.equal(short[name], long[name]) == name.endswith(".A") for name in short)


def test_beside_dora_each_first_matrix_that_it_froze_stays_frozen_and_all_else_learns(tiny_folder) -> None:
    """peft's LoRA-FA pairs parameters by their place in a list, and fails beside the magnitudes of DoRA."""
    parts = {"lora_fa": {"targets": ["*.attn.q"]}, "dora": {"targets": ["*.attn.v"]}}
    model = build(tiny_folder, torch.float64, Combo(methods=parts))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model(IDS).square().sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    layers = range(model.config.n_layers)
    assert learned == {
        *(f"blocks.{n}.attn.q.slot.lora_fa.B" for n in layers),
        *(f"blocks.{n}.attn.v.slot.dora.{part}" for n in layers for part in "ABm"),
    }
