"""Nemotron-H, whose layers are Mamba's, attention, an MLP or experts alone."""

import pytest
import torch
from conftest import TINY
from test_model import FAMILY_CASES
from tiny_families import make_family

from litpeft.methods.adapter import Adapter
from litpeft.methods.adapter_drop import AdapterDrop
from litpeft.methods.bottleneck import Bottleneck
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families import nemotron_h
from litpeft.train.activations import Kept

HF = TINY | FAMILY_CASES["nemotron_h"]
IDS = torch.randint(0, 257, (1, 40), generator=torch.Generator().manual_seed(1))


def test_a_pattern_of_letters_and_older_keys_mean_what_the_newer_ones_do() -> None:
    older = {key: value for key, value in HF.items() if key not in ("layers_block_type", "n_groups")}
    older |= {"hybrid_override_pattern": "M-*E", "mamba_n_groups": 2, "n_groups": 3, "mamba_d_conv": 3}
    assert nemotron_h.config(older) == nemotron_h.config(HF | {"conv_kernel": 3})
    assert [layer.only for layer in nemotron_h.config(older).layers] == ["mixer", "mlp", "mixer", "mlp"]
    for pattern in ("MX", "", None, 3):
        with pytest.raises(ValueError, match="hybrid_override_pattern .* must be letters of "):
            nemotron_h.config(older | {"hybrid_override_pattern": pattern})


@pytest.mark.parametrize(
    ("method", "places"),
    [
        (Bottleneck(), ["0.after_attn", "1.after_mlp", "2.after_attn", "3.after_mlp"]),
        (AdapterDrop(), ["1.after_mlp", "3.after_mlp"]),
        (Adapter(prompt_length=3), ["2.attn.core"]),
    ],
)
def test_methods_act_in_the_parts_that_a_layer_has(method, places: list[str], tmp_path) -> None:
    make_family(tmp_path, "nemotron_h", torch.float64)
    model = build(tmp_path, torch.float64, method)
    assert sorted({".".join(name.split(".")[1:-2]) for name in trainable(model)}) == places
    for name, parameter in trainable(model).items():
        if name.endswith((".up", ".gate")):
            torch.nn.init.normal_(parameter, std=0.1)
    model(IDS, at=torch.arange(39), targets=IDS[0, 1:]).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model).values())
    assert all(Kept(cheap=True, itemsize=4).of(block) > 0 for block in model.blocks)
