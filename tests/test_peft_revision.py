"""`revision` of adapter_config.json: the commit of the base on the hub, which `litpeft download` notes."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from litpeft.core.checksums import hub_origin, tensor_sums, write_checksums
from litpeft.core.errors import ModelError
from litpeft.exchange.run import find_run

HELD, OTHER = "a" * 40, "b" * 40


@pytest.mark.parametrize("revision", [None, "main", HELD])
def test_the_base_must_be_of_the_commit_that_is_named(tiny_folder, tmp_path, monkeypatch, revision) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path(shutil.copytree(tiny_folder, "checkpoints/org/tiny"))
    sums = tensor_sums(base / "model.safetensors")
    write_checksums(base, sums, f"org/tiny@{HELD}")
    assert hub_origin(base) == ("org/tiny", HELD)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], revision=revision)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained("adapter")
    path = Path("adapter/adapter_config.json")
    keys = json.loads(path.read_text()) | {"base_model_name_or_path": "org/tiny"}
    assert keys["revision"] == revision
    path.write_text(json.dumps(keys))
    assert find_run(Path("adapter")).base_folder() == Path("checkpoints/org/tiny")
    path.write_text(json.dumps(keys | {"revision": OTHER}))
    with pytest.raises(ModelError, match=f"revision is {OTHER} of org/tiny, and checkpoints/org/tiny holds {HELD}"):
        find_run(Path("adapter")).base_folder()
    assert find_run(Path("adapter")).base_folder(str(base)) == base
    path.write_text(json.dumps(keys | {"revision": 3}))
    with pytest.raises(ModelError, match="revision must be"):
        find_run(Path("adapter"))
