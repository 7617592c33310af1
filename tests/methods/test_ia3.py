"""IA3 against peft: the same factors give the same logits and the same gradients."""

import pytest
import torch
from conftest import TINY, in_float64, make_folder
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from litpeft.core.errors import ConfigError
from litpeft.methods.ia3 import IA3
from litpeft.model.build import build
from litpeft.model.delta import trainable


@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_gradients_equal_peft(biases: bool, tmp_path) -> None:
    """peft scales the input of down_proj, which is silu(gate) * up: the same factors as on the output of up."""
    folder = make_folder(tmp_path / "model", attention_bias=biases, mlp_bias=biases)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: torch.randn_like(x) * 0.2 for name, x in tensors.items() if name.endswith(".bias")}
    save_file(tensors | moved, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    ours, pairs = build(folder, torch.float64, IA3()).eval(), []
    for block, layer in zip(ours.blocks, theirs.base_model.model.model.layers, strict=True):
        pairs.append((block.attn.k.slot.ia3.g, layer.self_attn.k_proj.ia3_l["default"]))
        pairs.append((block.attn.v.slot.ia3.g, layer.self_attn.v_proj.ia3_l["default"]))
        pairs.append((block.mlp.up.slot.ia3.g, layer.mlp.down_proj.ia3_l["default"]))
    for own, other in pairs:
        torch.nn.init.normal_(own, 1.0, 0.2)
        other.data.copy_(own.data.view_as(other))
    ids = torch.randint(0, TINY["vocab_size"], (2, 24))
    want, got = theirs(ids).logits, ours(ids)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert all(torch.allclose(own.grad, other.grad.flatten(), rtol=1e-9, atol=1e-12) for own, other in pairs)


def test_an_mlp_without_a_gate_is_refused_and_its_attention_is_not(tmp_path) -> None:
    folder = make_folder(tmp_path / "model")
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"has no gate.*\n.*--method.targets"):
        build(folder, torch.float32, IA3())
    model = build(folder, torch.float32, IA3(targets=("*.attn.k", "*.attn.v")))
    assert sum(p.numel() for p in trainable(model).values()) == 2 * (32 + 32)
