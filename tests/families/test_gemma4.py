"""Gemma 4: layers that read the keys of another layer, in checkpointing, with methods and in files that hold them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import FAMILY_CASES
from tiny_families import make_family

from litpeft.core.errors import ConfigError
from litpeft.methods.adapter import Adapter
from litpeft.methods.ia3 import IA3
from litpeft.methods.lora import LoRA
from litpeft.methods.prefix import Prefix
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.model.families import gemma4_text

IDS = torch.randint(2, 257, (1, 40), generator=torch.Generator().manual_seed(1))
TEXT = FAMILY_CASES["gemma4_text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gemma4")
    make_family(made, "gemma4_text", torch.float64)
    return made


def test_activation_checkpointing_changes_no_gradient(folder) -> None:
    model, grads = build(folder, torch.float64).requires_grad_(True), []
    for recompute in ("none", "cheap", "block", "offload"):
        model.recompute = recompute
        model.zero_grad()
        model(IDS, Context.packed((15, 25), IDS.device, None), at=torch.arange(39), targets=IDS[0, 1:]).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
    assert all(float(grad.abs().max()) > 0 for grad in grads[0])


def test_files_that_hold_keys_of_layers_that_read_those_of_others_are_read(folder, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    rest = {
        name.replace("layers.1.", "layers.3."): t.clone()
        for name, t in tensors.items()
        if "layers.1.self_attn.k" in name
    }
    assert {name.split(".")[-2] for name in rest} == {"k_proj", "k_norm"}
    assert not rest.keys() & tensors.keys()
    save_file(tensors | rest, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(build(tmp_path, torch.float64)(IDS), build(folder, torch.float64)(IDS))


@pytest.mark.parametrize("method", [LoRA(rank=2), IA3(), Prefix(prompt_length=3)])
def test_methods_act_on_the_layers_that_are_there(method, folder) -> None:
    model = build(folder, torch.float64, method)
    model(IDS, at=torch.arange(39), targets=IDS[0, 1:]).backward()
    parts = trainable(model)
    assert all(parameter.grad is not None for parameter in parts.values())
    layers = {name.split(".")[1] for name in parts if ".attn.k." in name}
    assert layers == {"0", "1"}  # the other two read theirs


def test_keys_that_are_learned_are_read_by_the_layers_that_share_them(folder) -> None:
    model = build(folder, torch.float64, Prefix(prompt_length=3)).eval()
    with torch.no_grad():
        ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), IDS), 1)
        before = model(ids)
        for block in model.blocks[:2]:  # layer 2 reads the keys of 0, and 3 those of 1
            block.attn.k.slot.prefix.vectors.mul_(-5)
        assert (model(ids) - before).abs().max() > 1e-3


def test_prompts_that_need_keys_of_each_layer_are_refused(folder) -> None:
    with pytest.raises(ConfigError, match="the prompts of layer 2 need keys and values that the layer computes itself"):
        build(folder, torch.float64, Adapter(layers=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block true is not supported; it must be false"),
        (
            {"num_kv_shared_layers": 3},
            "num_kv_shared_layers 3 of 4 layers is not supported: no layer of full_attention",
        ),
        ({"vocab_size_per_layer_input": 300}, "vocab_size_per_layer_input 300 is not supported; it must be at least"),
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention "all" is not supported'),
        ({"global_head_dim": 31}, "layer 1 must have an even head_dim"),
        ({"num_global_key_value_heads": 3, "attention_k_eq_v": True}, "as many key heads as divide 4; it has 32 and 3"),
        ({"per_layer_config": {"1": {"hidden_act": "relu"}}}, r"per_layer_config.1.hidden_act is not supported"),
        ({"per_layer_config": {"full_attention": {}}}, r"per_layer_config.full_attention is not supported; it must be"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_key(change: dict, message: str) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=message):
        gemma4_text.config(sizes | TEXT | change)
