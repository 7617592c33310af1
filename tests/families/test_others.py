"""Models that are known and not supported are refused with the reason; a key that transformers reads wrongly."""

import json

import pytest
import torch
from conftest import in_float64
from tiny_families import make_family
from transformers import CONFIG_MAPPING

from litpeft.core.errors import ModelError
from litpeft.model.build import build
from litpeft.model.families import FAMILIES, OTHERS
from litpeft.model.families.read import read_config


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
