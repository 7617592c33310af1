"""Models that are known and not supported are refused with the reason; a key that transformers reads wrongly."""

import json

import pytest
import torch
from conftest import in_float64
from tiny_families import make_family
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from litpeft.core.errors import ModelError
from litpeft.model.build import build
from litpeft.model.families import FAMILIES, OTHERS
from litpeft.model.families.read import read_config
from litpeft.model.frequencies import rope_frequencies


@pytest.mark.parametrize("name", OTHERS)
def test_a_known_model_is_refused_with_the_reason(name: str, tmp_path) -> None:
    assert name in CONFIG_MAPPING
    assert name not in FAMILIES
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(ModelError) as refusal:
        read_config(tmp_path)
    assert f"model_type '{name}' is not supported ({OTHERS[name]})" in str(refusal.value)


@torch.no_grad()
def test_falcon_with_output_attentions_is_what_transformers_computes_with_a_mask_of_numbers(tmp_path) -> None:
    theirs = in_float64(make_family(tmp_path, "falcon", torch.float64))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_attentions": True}))
    asked = {"use_cache": False, "output_attentions": True}
    ids = torch.arange(2, 42)[None]
    mask = torch.full((40, 40), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    later = ids.clone()
    later[0, -1] = 100
    plain, changed = (theirs(x, **asked).logits for x in (ids, later))
    assert (plain - changed)[0, 0].abs().max() > 1e-3  # the first token sees the last one
    want = theirs(ids, attention_mask=mask, **asked).logits
    assert (build(tmp_path, torch.float64)(ids) - want).abs().max() <= 1e-10


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 1.0}])
def test_an_alpha_of_hunyuan_counts_beside_dynamic_only(rope: dict, tmp_path) -> None:
    make_family(tmp_path, "hunyuan_v1_dense")
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text()) | {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": rope}
    path.write_text(json.dumps(hf | {"rope_scaling": rope | {"alpha": 50.0}}))
    config = read_config(tmp_path)[1]
    want = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq
    assert torch.allclose(rope_frequencies(16, config.rope_theta, config.rope_scaling, "cpu"), want, rtol=1e-6)
    path.write_text(json.dumps(hf | {"rope_scaling": rope | {"rope_type": "dynamic", "alpha": 1e300}}))
    with pytest.raises(ModelError, match=r"rope_scaling\.alpha 1e\+300 is not supported for heads of size 16"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["attention", "conv"]}, "layer_types 'conv' is not supported; it must be one of "),
        ({"layer_types": ["mamba"]}, "layer_types has 1 entries, num_hidden_layers says 2"),
        ({"mamba_n_heads": 24}, "mamba_n_heads 24 times mamba_d_head 341 must be 8192, the width of Mamba's layers"),
        ({"mamba_n_groups": 3}, "128 heads of Mamba are no multiple of its 3 groups"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported in a model with layers of Mamba; silu is"),
        ({"time_step_limit": [0.5, 0.1]}, r"time_step_limit \[0.5, 0.1\] is not supported; it must be two numbers"),
    ],
)
def test_what_would_change_the_results_of_mamba_is_refused_by_name(changes: dict, message: str, tmp_path) -> None:
    hf = {"model_type": "granitemoehybrid", "num_hidden_layers": 2} | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)
