"""`convert` takes the text model out of one that reads images: it computes what the whole computes for text."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_model import FAMILY_CASES, YARN, randomise
from tiny_families import write_plain_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

from litpeft.cli import main
from litpeft.core.errors import UserError
from litpeft.core.safetensors import Weights
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_classes import QWEN3_5_SPLIT
from litpeft.model.build import build
from litpeft.model.families.read import read_config

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2, "pad_token_id": 0}
MINISTRAL = {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}
MODELS = {
    "gemma3": ("gemma3_text", GEMMA),
    "gemma4": ("gemma4_text", FAMILY_CASES["gemma4_text"]),
    "mistral3": ("ministral3", MINISTRAL),
    "qwen3_5": ("qwen3_5_text", FAMILY_CASES["qwen3_5_text"]),
    "qwen3_5_moe": ("qwen3_5_moe_text", FAMILY_CASES["qwen3_5_moe_text"]),
}
EYES = {"gemma3": "siglip_vision_model", "gemma4": "gemma4_vision", "mistral3": "pixtral"}
EYES |= {"qwen3_5": "qwen3_5_vision", "qwen3_5_moe": "qwen3_5_moe_vision"}
IDS = torch.arange(2, 42)[None]


def make_whole(folder: Path, name: str, **changes: object) -> torch.nn.Module:
    family, own = MODELS[name]
    text = {**TINY, **own, "model_type": family, "initializer_range": 0.1}
    vision = {"model_type": EYES[name], "image_size": 28, "patch_size": 14, **SMALL}
    config = CONFIG_MAPPING[name](text_config=text, vision_config=vision, image_token_index=319, **changes)
    torch.manual_seed(0)
    model = randomise(AutoModelForImageTextToText.from_config(config)).eval()
    model.save_pretrained(folder)
    write_plain_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_text_model_computes_what_the_whole_computes_for_text(name: str, tmp_path) -> None:
    theirs = make_whole(tmp_path / "whole", name)
    with pytest.raises(UserError, match="takes its text model out"):
        read_config(tmp_path / "whole")
    main(["convert", str(tmp_path / "whole"), str(tmp_path / "text")])
    assert read_config(tmp_path / "text")[0] == MODELS[name][0]
    with torch.no_grad():
        want, got = theirs(input_ids=IDS).logits, build(tmp_path / "text", torch.float32)(IDS)
    assert (want - got).abs().max() <= 5e-6 * max(1, float(want.abs().max()))
    assert not any("vision" in tensor for tensor in Weights(tmp_path / "text").file_of)


def test_experts_in_one_tensor_and_what_predicts_several_tokens_are_as_in_the_files_of_qwen3_5(tmp_path) -> None:
    make_whole(tmp_path / "whole", "qwen3_5_moe")
    main(["convert", str(tmp_path / "whole"), str(tmp_path / "text")])
    file = tmp_path / "whole" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    want = load_file(tmp_path / "text" / "model.safetensors")
    for layer in range(2):
        expert = lambda leaf, layer=layer: [
            want[f"model.layers.{layer}.mlp.experts.{i}.{leaf}.weight"] for i in range(5)
        ]
        joined = torch.cat((torch.stack(expert("gate_proj")), torch.stack(expert("up_proj"))), 1)
        tensors[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"] = joined
        tensors[f"model.language_model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(expert("down_proj"))
    save_file(tensors | {"mtp.fc.weight": torch.ones(2, 2)}, file)
    main(["convert", str(tmp_path / "whole"), str(tmp_path / "again")])
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_texts_are_cut_as_for_the_whole_model_whatever_class_is_named(tmp_path) -> None:
    make_whole(tmp_path / "whole", "qwen3_5")
    spec = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": QWEN3_5_SPLIT}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, spec["pre_tokenizer"] | {"use_regex": False}]}
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "whole" / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "whole" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    main(["convert", str(tmp_path / "whole"), str(tmp_path / "text")])
    theirs = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "text")]
    assert [type(one).__name__ for one in theirs] == ["Qwen3_5Tokenizer"] * 2
    ours, text = Tokenizer.load(tmp_path / "text"), "हिन्दी में e\u0301 it's WE'LL"
    assert ours.encode(text) == theirs[0].encode(text) == theirs[1].encode(text)
