"""Models that are known and not supported are refused with the reason."""

import json

import pytest
from transformers import CONFIG_MAPPING

from litpeft.core.errors import ModelError
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
