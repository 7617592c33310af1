"""GGUF by family: what llama.cpp computes otherwise is refused by key; other headers, and adapters."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY, finetune
from families.tiny_families import MODELS, make_family
from llama_cpp import next_token, of_model, server, write_bpe
from safetensors.torch import load_file
from test_adapters_out import EVERYWHERE, adapter
from test_gguf_out import HYBRID, LINEAR, ROWS, TURNS, WRITTEN, made, make, written

from litpeft.core.errors import ConfigError, ModelError, UserError
from litpeft.exchange.convert import convert
from litpeft.exchange.gguf.alike import alike
from litpeft.exchange.gguf.config import hf_config
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.gguf.weights import GgufFile
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.model.build import build
from litpeft.model.families import family
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of, read_config

PROMPT = torch.randint(3, 250, (20,), generator=torch.Generator().manual_seed(1)).tolist()


def layout(model_type: str, **changes: object) -> Layout:
    """Returns the layout of a model that is described and not built."""
    return Layout(NameMap(*config_of(TINY | {"model_type": model_type} | changes, "config.json")))


GEMMA3 = {"num_hidden_layers": 7, "sliding_window": 30, "head_dim": 32, "query_pre_attn_scalar": 32}
SCALED_WINDOWS = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
WINDOWS = r"computes with windows and positions in other layers \(config.json: layer_types, sliding_window\)"


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("phi", {"qk_layernorm": True}, r"qk_norm None, and this model has head \(config.json: qk_layernorm\)"),
        ("phi", {"hidden_act": "relu"}, r"activation gelu or gelu_tanh, .* relu \(config.json: hidden_act\)"),
        ("falcon", {"parallel_attn": False}, r"parallel_residual True, .* False \(config.json: parallel_attn\)"),
        ("falcon", {"bias": True}, r"qkv_bias False, and this model has True \(config.json: bias\)"),
        ("falcon", {"activation": "relu"}, r"activation gelu or gelu_tanh, .* relu \(config.json: activation\)"),
        ("falcon", {"alibi": True}, "alibi true is not supported; it must be false"),
        ("olmo", {"attention_bias": True}, r"qkv_bias False, and this model has True \(config.json: attention_bias\)"),
        ("olmo3", TURNS | {"layer_types": ["full_attention", *["sliding_attention"] * 4]}, WINDOWS),
        (
            "olmo3",  # windows that rotate at another theta than the others
            TURNS | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            WINDOWS,
        ),
        ("exaone4", TURNS, WINDOWS),
        ("exaone4", {"num_hidden_layers": 64, "sliding_window_pattern": 2}, WINDOWS),
        ("cohere2", TURNS | {"sliding_window_pattern": 2}, WINDOWS),
        ("cohere2", {"sliding_window": 30}, WINDOWS),  # of two layers both have one
        ("cohere2", TURNS | {"attention_bias": True}, r"has True \(config.json: attention_bias\)"),
        (
            "cohere2",
            TURNS | {"tie_word_embeddings": False},
            r"no place for lm_head.weight, .* \(config.json: tie_word_emb",
        ),
        ("gemma3_text", GEMMA3 | {"rope_parameters": SCALED_WINDOWS}, WINDOWS),
        ("cohere", {"use_qk_norm": True}, r"qk_norm None, and this model has each \(config.json: use_qk_norm\)"),
        ("smollm3", {"num_hidden_layers": 5, "mlp_bias": True}, r"has True \(config.json: mlp_bias\)"),
        ("qwen3_5_text", LINEAR | {"layer_types": LINEAR["layer_types"][::-1]}, r"every n-th layer, n from 2"),
        ("qwen3_5_text", LINEAR | {"linear_key_head_dim": 8}, "linear_key_head_dim 8 and linear_value_head_dim 16"),
        ("qwen3_5_text", LINEAR | {"rms_norm_eps": 1e-5}, "qwen35 computes with norm_eps 1e-06, and this model has"),
        (
            "qwen3_next",
            LINEAR | {"mlp_only_layers": [1]},
            r"dense_layers=\(\).*, and this model has .*dense_layers=\(1,",
        ),
        ("granitemoehybrid", {"mamba_n_heads": 8}, r"attention in some layers \(config.json: layer_types\)"),
        ("granitemoehybrid", HYBRID | {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("granitemoehybrid", HYBRID | {"time_step_limit": [0.1, 0.2]}, "time_step_limit"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_key(model_type: str, changes: dict, said: str) -> None:
    with pytest.raises((ConfigError, UserError), match=said):
        layout(**{"model_type": model_type} | changes)


@pytest.mark.parametrize(
    "name", ["qwen2", "phi", "phi3", "olmo", "olmo2", "olmo3", "glm", "starcoder2", "nemotron", "cohere", "cohere2"]
)
def test_heads_of_a_size_that_llama_cpp_does_not_take_are_refused(name: str) -> None:
    changes = dict(WRITTEN[name][0])
    assert layout(**changes).config.head_dim == 16
    with pytest.raises(ConfigError, match=r"head_dim 16, and this model has 32 \(config.json: head_dim\)"):
        layout(**changes | {"head_dim": 32})


# What llama.cpp's own script leaves out of a header, or writes and we do not.
OTHERWISE = {
    "phi": dict.fromkeys(("attention.key_length", "attention.value_length", "rope.freq_base", "vocab_size")),
    "falcon": dict.fromkeys(("attention.key_length", "rope.dimension_count", "rope.freq_base", "vocab_size"))
    | {"tensor_data_layout": "jploski"},
    "olmo3": {"attention.sliding_window_pattern": [True, True, True, False, True]},
    "cohere2": {"rope.scaling.type": "none", "attention.sliding_window_pattern": 4},
    "glm4": {"rope.scaling.type": "none", "attention.value_length": None},
    "qwen3_5_text": {"full_attention_interval": None, "attention.recurrent_layers": [True, False], "vocab_size": None},
    "qwen3_5_moe_text": {"feed_forward_length": None, "vocab_size": None},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_headers_as_llama_cpp_writes_them_say_the_same(tmp_path_factory, name: str) -> None:
    base, path = made(tmp_path_factory, name)
    file, arch = GgufFile(path), family(name).GGUF.arch
    changed = file.values | {f"{arch}.{key}": value for key, value in OTHERWISE[name].items()}
    changed = {key: value for key, value in changed.items() if value is not None}
    _, config = config_of(hf_config(changed, file.stored), "")
    assert alike(config, read_config(base)[1])


@pytest.mark.parametrize("pattern", [2, [True, False] * 2 + [True]])
def test_windows_of_a_header_in_other_layers_are_refused(tmp_path_factory, pattern: object) -> None:
    file = GgufFile(made(tmp_path_factory, "olmo3")[1])
    with pytest.raises(ModelError, match="Olmo3ForCausalLM cannot express olmo2.attention.sliding_window_pattern"):
        hf_config(file.values | {"olmo2.attention.sliding_window_pattern": pattern}, file.stored)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def joined(held: dict[str, np.ndarray]) -> None:
    """Makes q, k and v of each layer one tensor, as llama.cpp's script may."""
    for name in list(held):
        if "attn_q." in name:
            parts = [held.pop(name.replace("attn_q.", f"attn_{one}.")) for one in "qkv"]
            held[name.replace("attn_q.", "attn_qkv.")] = np.concatenate(parts)


def squeezed(held: dict[str, np.ndarray]) -> None:
    """Makes the gate of an MLP that all tokens go through a vector, as llama.cpp's older script does."""
    for name in held:
        held[name] = held[name][0] if "ffn_gate_inp_shexp" in name else held[name]


def with_tensors(path: Path, out: Path, held: dict[str, np.ndarray], **changes: int) -> Path:
    """Writes a file with the header of another, but for changes of its architecture's keys, and these tensors."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer, changes = gguf.GGUFWriter(out, arch), {f"{arch}.{key}": value for key, value in changes.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes:
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for name, value in changes.items():
        writer.add_uint32(name, value)
    for name, values in held.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(("name", "change"), [("phi", joined), ("glm4", joined), ("qwen2_moe", squeezed)])
def test_tensors_of_another_shape_are_read(tmp_path, tmp_path_factory, name: str, change: Callable) -> None:
    base, path = made(tmp_path_factory, name)
    change(held := tensors_of(path))
    file = with_tensors(path, tmp_path / "other.gguf", held)
    convert(Convert(str(file), str(tmp_path / "back")))
    want, got = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    with server(file) as client:  # llama.cpp computes with it what it computes with the other
        want = of_model(build(base, torch.float32), PROMPT)
        assert (next_token(client, PROMPT, ROWS) - want).abs().max() <= WRITTEN[name][1]


def test_numbers_of_a_base_in_16_bits_are_computed_in_float32(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "this", WRITTEN["qwen3_5_text"][0])
    make_family(tmp_path / "base", "this", torch.bfloat16)
    held = tensors_of(written(write_bpe(tmp_path / "base"), tmp_path / "out", type="f32"))
    of_layer = {name: values.float() for name, values in load_file(tmp_path / "base" / "model.safetensors").items()}
    norm, decay = (of_layer[f"model.layers.0.{name}"] for name in ("input_layernorm.weight", "linear_attn.A_log"))
    assert torch.equal(torch.from_numpy(held["blk.0.attn_norm.weight"]), 1 + norm)
    assert torch.equal(torch.from_numpy(held["blk.0.ssm_a"]), -decay.exp().view(2, 3).t().flatten())


def test_an_older_file_of_qwen3_next_is_read(tmp_path, tmp_path_factory) -> None:
    base, path = made(tmp_path_factory, "qwen3_next")
    held, want = tensors_of(path), load_file(base / "model.safetensors")
    for name in ("attn_qkv", "attn_gate"):
        del held[f"blk.0.{name}.weight"]
    held["blk.0.ssm_in.weight"] = want["model.layers.0.linear_attn.in_proj_qkvz.weight"].numpy()
    file = with_tensors(path, tmp_path / "older.gguf", held)
    convert(Convert(str(file), str(tmp_path / "back")))
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.allclose(want[key], got[key], rtol=1e-6, atol=1e-7) for key in want)
    with server(file) as client:  # which computes with it what it computes with the newer one
        want = of_model(build(base, torch.float32), PROMPT)
        assert (next_token(client, PROMPT, ROWS) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "glm4_moe"])
def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path, tmp_path_factory, capsys, name: str) -> None:
    base, path = made(tmp_path_factory, name)
    held, ones = tensors_of(path), np.ones(64, np.float32)
    held |= {name.replace("blk.1.", "blk.2."): values for name, values in held.items() if name.startswith("blk.1.")}
    held |= {f"blk.2.nextn.{norm}.weight": ones for norm in ("enorm", "hnorm", "shared_head_norm")}
    held["blk.2.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)
    held |= {name: values[0] for name, values in held.items() if "gate_inp_shexp" in name}  # a vector, in some files
    file = with_tensors(path, tmp_path / "more.gguf", held, block_count=3, nextn_predict_layers=1)
    convert(Convert(str(file), str(tmp_path / "back")))
    assert "; without the 1 layer for further tokens" in capsys.readouterr().out
    want, got = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    assert want.keys() == got.keys()
    assert all(torch.allclose(want[key], got[key], rtol=1e-6, atol=1e-7) for key in want)
    with server(file) as client:
        want = of_model(build(base, torch.float32), PROMPT)
        assert (next_token(client, PROMPT, ROWS) - want).abs().max() <= 1e-5


def test_a_tensor_with_a_part_that_does_not_fold_into_groups_is_written_as_numbers(tmp_path, tmp_path_factory) -> None:
    base = made(tmp_path_factory, "qwen3_5_text")[0]
    targets = "--method.targets", '["*.attn.q", "*.attn.in_v"]'
    run = finetune(base, tmp_path, "--train.max_steps", "3", "--base.quantize", "int4", *targets)
    convert(Convert(str(run), str(tmp_path / "out"), to="gguf", type="f32"))  # which compares its logits with the run's
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    }
    plain = ("blk.1.attn_q", "blk.0.attn_qkv", "blk.0.ssm_out")  # the gate beside q, k beside v; columns that move
    assert {kinds[f"{name}.weight"] for name in plain} == {"F32"}
    assert {kinds[f"{name}.weight"] for name in ("blk.1.attn_k", "blk.0.attn_gate", "blk.0.ssm_alpha")} == {"Q4_1"}


QUICK = ("falcon, new", "glm4", "qwen3_5_text", "qwen3_next")
OTHERS = ("phi", "falcon", "olmo", "olmo3", "cohere", "cohere2", "glm", "granitemoehybrid, Mamba")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_llama_cpp_computes_with_the_adapter_what_the_run_computes(tmp_path, monkeypatch, name: str) -> None:
    base = make(tmp_path / "base", monkeypatch, WRITTEN[name][0])
    run = finetune(base, tmp_path, "--train.max_steps", "3", "--train.lr", "3e-2", *EVERYWHERE)
    adapter(run, tmp_path / "adapter", "gguf-adapter")
    file = written(base, tmp_path / "out", type="f32", no_verify=True)
    want = of_model(load_model(str(run), precision="32-true").model, PROMPT)
    with server(file, tmp_path / "adapter" / "adapter.gguf") as client:
        assert (next_token(client, PROMPT, ROWS) - want).abs().max() <= WRITTEN[name][1]
    with server(file) as client:
        assert (next_token(client, PROMPT, ROWS) - want).abs().max() > 1e-2
