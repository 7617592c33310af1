"""Hugging Face folders of `merge` and `finetune full`: transformers loads them without a word, older readers too."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from conftest import finetune
from families.tiny_families import MODELS, limit, make_family
from safetensors.torch import load_file
from test_model import CASES
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.generate.load import load_model
from litpeft.model.families.read import config_of
from litpeft.model.rope import spell_twice

IDS = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(5))
LEARN = "--train.epochs", "2", "--train.lr", "1e-2"
LLAMA3 = CASES["rope llama3"]


def silently_loaded(folder: Path, caplog) -> torch.nn.Module:
    """Returns transformers' model; fails for any warning, and for a tensor that is missing or too many."""
    caplog.clear()
    logger = logging.getLogger("transformers")
    logger.propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    logger.propagate = False
    assert not any(info.values())
    said = [record.getMessage() for record in caplog.records]
    assert [message for message in said if not message.endswith("'dynamic': {'alpha'}")] == []  # of Hunyuan's own files
    return model.eval()


SLOW = {"qwen2_moe", "granitemoe", "granitemoehybrid", "glm4_moe", "ernie4_5_moe"}  # their layout is that of others
SLOW |= {"bamba", "falcon_h1", "lfm2_moe"}
NAMES = [pytest.param(name, "lora", marks=pytest.mark.slow) if name in SLOW else (name, "lora") for name in MODELS]


@pytest.mark.parametrize(("name", "method"), [*NAMES, ("llama3", "lora"), ("llama3", "full")])
def test_transformers_loads_the_folder_without_a_word(tmp_path, monkeypatch, caplog, name: str, method: str) -> None:
    monkeypatch.setitem(MODELS, "llama3", LLAMA3)
    make_family(tmp_path / "base", name)
    run = finetune(tmp_path / "base", tmp_path, *LEARN, method=method)
    folder = run / "final"
    if method == "lora":
        main(["merge", str(run), "--shard_size", "1e-4"])
        folder = run / "merged"
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        tensors = (load_file(path) for path in folder.glob("*.safetensors"))
        largest = max(tensor.nbytes for file in tensors for tensor in file.values())
        assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < max(1e5, largest) + 2**18
    theirs = silently_loaded(folder, caplog)
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        assert (theirs(IDS).logits - want).abs().max() <= limit(name) * want.abs().max()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert config.get("tie_word_embeddings", tied) == tied
    if "rope_theta" in config.get("rope_parameters", {}):  # each of the two spellings alone is the same model
        older = {key: value for key, value in config.items() if key != "rope_parameters"}
        newer = {key: config[key] for key in config if key not in OLD}
        assert config_of(older, "older") == config_of(newer, "newer") == config_of(config, "both")


OLD = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e4, "rope_type": "linear"}},
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        ({}, {}),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, {}),  # differs from layer to layer
    ],
)
def test_the_other_spelling_is_added(given: dict, added: dict) -> None:
    config = json.loads(json.dumps(given))
    spell_twice(config, {})
    assert config == given | added
