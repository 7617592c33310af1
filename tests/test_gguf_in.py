"""GGUF files of every family that is written, read again: the model that they were written from."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from test_gguf_out import NAMES, WRITTEN, made, make, written
from test_model import YARN
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from litpeft.core.errors import ModelError
from litpeft.core.json import read_json
from litpeft.exchange.convert import convert
from litpeft.exchange.gguf.alike import alike
from litpeft.exchange.gguf.config import hf_config
from litpeft.exchange.gguf.weights import GgufFile
from litpeft.exchange.settings import Convert
from litpeft.model.build import build
from litpeft.model.families import FAMILIES
from litpeft.model.families.read import config_of, read_config

IDS = torch.randint(3, TINY["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
ALSO = {  # read as another model_type, which computes the same
    "mistral": "llama",
    "ministral": "llama",
    "granitemoehybrid": "granite",
}


def read_back(file: Path, out: Path, **settings: object) -> Path:
    convert(Convert(str(file), str(out), **settings))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_back_the_model_that_it_was_written_from(
    tmp_path, monkeypatch, tmp_path_factory, name: str
) -> None:
    base, file = made(tmp_path_factory, name)
    if name == "gpt_oss":  # llama.cpp rounds yarn's bounds, and this family does not
        base = make(tmp_path / "base", monkeypatch, WRITTEN[name][0] | {"rope_parameters": YARN | {"truncate": False}})
        file = written(base, tmp_path / "out", type="f32", no_verify=True)
    back = read_back(file, tmp_path / "back")
    (kind, want), (read_kind, read) = read_config(base), read_config(back)
    assert read_kind == (kind if "Mamba" in name else ALSO.get(kind, kind))
    for key in (field.name for field in fields(want) if field.name not in ("window", "max_positions", "activation")):
        assert alike(getattr(read, key), getattr(want, key)), key
    assert read.max_positions == min(want.max_positions, want.window or want.max_positions)
    assert read_json(back / "config.json", "")["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[read_kind]]
    tensors = load_file(back / "model.safetensors")
    for tensor_name, tensor in load_file(base / "model.safetensors").items():
        if tensor_name in tensors or not read.tie_embeddings:
            torch.testing.assert_close(tensors[tensor_name], tensor, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        logits = build(base, torch.float32)(IDS)
        assert (build(back, torch.float32)(IDS) - logits).abs().max() <= 1e-6 * logits.abs().max()
        if name in FAMILIES:
            theirs = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
            assert (theirs(IDS).logits - logits).abs().max() <= 5e-6 * logits.abs().max()


WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 20, "pad_token_id": 0}
# What transformers' reader does not take from a header has its default: sizes of heads, shares that rotate, biases.
READ_BY_TRANSFORMERS = {
    **{
        name: WRITTEN[name][0]
        for name in ("llama", "gpt2", "qwen2", "starcoder2", "stablelm", "stablelm, parallel", "falcon")
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", "num_hidden_layers": 3} | WIDE,
    "gemma3_text": {"model_type": "gemma3_text", "num_hidden_layers": 7} | WIDE,
    "nemotron": {"model_type": "nemotron"},
}


@pytest.mark.parametrize(("name", "type_"), [*((name, "q8_0") for name in READ_BY_TRANSFORMERS), ("gemma2", "q4_0")])
def test_transformers_reads_the_same(tmp_path, monkeypatch, tmp_path_factory, name: str, type_: str) -> None:
    own = name in WRITTEN and READ_BY_TRANSFORMERS[name] == WRITTEN[name][0]
    base = made(tmp_path_factory, name)[0] if own else make(tmp_path / "base", monkeypatch, READ_BY_TRANSFORMERS[name])
    file = written(base, tmp_path / "out", type=type_, no_verify=True)
    back = read_back(file, tmp_path / "back", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(IDS).logits
        assert (build(back, torch.float32)(IDS) - want).abs().max() <= 2e-5 * want.abs().max()


# What llama.cpp's own script leaves out of a header, or writes and we do not.
OTHERWISE = {
    "gpt2": dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")),
    "gpt_neox": dict.fromkeys(("attention.head_count_kv", "attention.key_length")),
    "phi3": {"attention.sliding_window": 100, "context_length": 512, "rope.scaling.original_context_length": 512},
    "gemma3_text": {"rope.freq_base_swa": None},
    "gemma4_text": {"attention.head_count_kv": [2, 2, 2, 2], "rope.freq_base_swa": None},
    "deepseek_v2": dict.fromkeys(("expert_gating_func", "expert_group_count", "expert_weights_norm")),
    "granite": {"expert_count": 0, "rope.scaling.type": "none"},
    "granitemoehybrid": {
        "attention.head_count_kv": [2, 2],
        "expert_count": 0,
        "expert_shared_feed_forward_length": 96,
        "rope.scaling.finetuned": True,
        "ssm.conv_kernel": 4,
    },
    "granitemoehybrid, Mamba": {
        "attention.key_length": None,
        "expert_count": 0,
        "expert_shared_feed_forward_length": 96,
        "rope.dimension_count": 16,
        "rope.freq_base": 5000.0,
    },
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_headers_as_llama_cpp_writes_them_say_the_same(tmp_path_factory, name: str) -> None:
    base, path = made(tmp_path_factory, name)
    file = GgufFile(path)
    arch = file.values["general.architecture"]
    changed = file.values | {f"{arch}.{key}": value for key, value in OTHERWISE[name].items()}
    changed = {key: value for key, value in changed.items() if value is not None}
    _, config = config_of(hf_config(changed, file.stored), "")
    assert alike(config, read_config(base)[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; convert reads llama, qwen2, "),
        ({"qwen2.expert_shared_count": 2}, "Qwen2ForCausalLM cannot express qwen2.expert_shared_count = 2"),
        ({"qwen2.attention.value_length": 8}, "qwen2.attention.value_length = 8: Qwen2ForCausalLM needs it to be 16"),
        ({"general.architecture": "deepseek2"}, "deepseek2.block_count must be an integer"),
        ({"qwen2.rope.freq_base": "high"}, "qwen2.rope.freq_base must be a positive number, got high"),
    ],
)
def test_what_a_header_may_not_say_is_refused(tmp_path_factory, changes: dict, said: str) -> None:
    file = GgufFile(made(tmp_path_factory, "qwen2")[1])
    with pytest.raises(ModelError, match=said):
        hf_config(file.values | changes, file.stored)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("deepseek_v2", {"deepseek2.attention.key_length_mla": None}, "deepseek2.attention.key_length_mla is missing"),
        ("deepseek_v2", {"deepseek2.rope.dimension_count": 64}, "64 dimensions of a head of 24 cannot rotate"),
        (
            "deepseek_v2",
            {"deepseek2.expert_group_count": 2},
            "expert_group_count = 2: Deepseek.* needs it to be 1",
        ),
        ("gemma4_text", {"gemma4.attention.head_count_kv": [2, 2]}, "head_count_kv must be 4 of int, got .2, 2."),
        ("gemma4_text", {"gemma4.attention.sliding_window_pattern": [True] * 4}, "the last with a window: True"),
        ("gemma4_text", {"gemma4.expert_count": 4}, "Gemma4ForCausalLM cannot express gemma4.expert_count = 4"),
    ],
)
def test_what_a_header_of_layers_that_differ_may_not_say(tmp_path_factory, name: str, changes: dict, said: str) -> None:
    file = GgufFile(made(tmp_path_factory, name)[1])
    values = {key: value for key, value in (file.values | changes).items() if value is not None}
    with pytest.raises(ModelError, match=said):
        hf_config(values, file.stored)
