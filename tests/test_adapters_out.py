"""What a run learned as an adapter of other programs: base and adapter compute there what the run computes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder
from families.tiny_families import make_family
from llama_cpp import next_token, of_model, server, write_bpe
from safetensors.torch import load_file

from litpeft.core.errors import ConfigError, ModelError
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.model.build import build

PROMPT = torch.randint(3, 250, (20,), generator=torch.Generator().manual_seed(1)).tolist()
LEARN = "--train.epochs", "3", "--train.lr", "1e-2"
EVERYWHERE = "--method.targets", '["*.attn.*", "*.mlp.*"]', "--method.ranks", '{"*.attn.k": 3}'
GELU = 2e-3  # llama.cpp looks its GELU up in a table of float16


def adapter(source: Path, out: Path, to: str, **settings: object) -> Path:
    convert(Convert(str(source), str(out), to=to, **settings))
    return out


@pytest.mark.parametrize(
    ("family", "method", "options", "limit"),
    [
        ("llama", "lora", EVERYWHERE, 1e-5),
        ("llama", "pissa", (), 2e-5),
        ("neox", "lora", ("--method.targets", '["*.attn.q", "*.attn.v", "*.mlp.*"]'), GELU),
        ("gpt2", "lora", EVERYWHERE, GELU),
    ],
)
def test_llama_cpp_computes_with_the_adapter_what_the_run_computes(tmp_path, family, method, options, limit) -> None:
    make_family(tmp_path / "base", family)
    base = write_bpe(tmp_path / "base")
    run = finetune(base, tmp_path, *LEARN, *options, method=method)
    adapter(base, tmp_path / "gguf", "gguf", type="f32")
    adapter(run, tmp_path / "adapter", "gguf-adapter")
    want = of_model(load_model(str(run), precision="32-true").model, PROMPT)
    with server(tmp_path / "gguf" / "model.gguf", tmp_path / "adapter" / "adapter.gguf") as client:
        assert (next_token(client, PROMPT, 320) - want).abs().max() <= limit
    assert (of_model(build(base, torch.float32), PROMPT) - want).abs().max() > 100 * limit or limit == GELU
    said = (tmp_path / "adapter" / "Modelfile").read_text()
    assert said.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")


@pytest.mark.parametrize("to", ["gguf-adapter", "mlx"])
def test_an_adapter_that_is_not_the_run_is_refused(tmp_path, monkeypatch, to: str) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    run = finetune(base, tmp_path, *LEARN)
    from litpeft.exchange.exports import gguf_adapter, mlx

    whole = gguf_adapter.factors_of

    def turned(*args: object) -> dict:
        return {name: (a.flip(0), b) for name, (a, b) in whole(*args).items()}

    monkeypatch.setattr(gguf_adapter, "factors_of", turned)
    monkeypatch.setattr(mlx, "factors_of", turned)
    with pytest.raises(ModelError, match="logits of the adapter read back, on its base are off by"):
        adapter(run, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    adapter(run, tmp_path / "out", to, no_verify=True)


@pytest.mark.parametrize("method", ["pissa", "lora_ga"])
def test_what_was_taken_out_of_weights_that_were_then_rounded_is_exported(method: str, tmp_path, capsys) -> None:
    base = write_bpe(make_folder(tmp_path / "base", dtype="bfloat16"))
    run = finetune(base, tmp_path, *LEARN, "--base.precision", "bf16-true", method=method)
    capsys.readouterr()
    for to in ("peft", "gguf-adapter", "mlx"):
        adapter(run, tmp_path / to, to)
        found = re.search(r"the run, its weights in bfloat16 +differs by (\S+), .*allowed: (\S+)\n", said(capsys))
        assert 0 < float(found[1]) < float(found[2])
    exact, read = (load_model(str(one), precision="32-true").model for one in (run, tmp_path / "peft"))
    assert torch.allclose(of_model(read, PROMPT), of_model(exact, PROMPT), atol=1e-4)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_the_mlx_adapter_is_what_mlx_lm_reads(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base")
    run = finetune(base, tmp_path, *LEARN, "--method.ranks", '{"blocks.0.attn.q": 3}', "--method.alpha", "20")
    out = adapter(run, tmp_path / "mlx", "mlx")
    assert "adapter read back, on its base" in capsys.readouterr().out
    delta, stored = load_file(run / "final" / "delta.safetensors"), load_file(out / "adapters.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert config["lora_parameters"]["scale"] == 1.0
    rank = config["lora_parameters"]["rank"]
    assert {key.split("layers.0.")[1].rsplit(".", 1)[0] for key in stored if "layers.0." in key} == set(
        config["lora_parameters"]["keys"]
    )
    for name, scale in (("attn.q", 20 / 3), ("mlp.up", 20 / rank)):
        if f"blocks.0.{name}.slot.lora.A" in delta:
            a, b = (delta[f"blocks.0.{name}.slot.lora.{key}"] for key in "AB")
            module = {"attn.q": "self_attn.q_proj", "mlp.up": "mlp.up_proj"}[name]
            la, lb = (stored[f"model.layers.0.{module}.lora_{key}"] for key in "ab")
            assert la.shape == (64, rank)
            assert torch.allclose(la @ lb, scale * (b @ a).T, atol=1e-6)


MLX = os.environ.get("LITPEFT_MLX_PYTHON")  # an interpreter with mlx[cpu] and mlx-lm: scripts/verify_formats.sh
IN_MLX = """
import sys, mlx.core as mx, numpy as np
from mlx_lm.utils import load
model, _ = load(sys.argv[1], adapter_path=sys.argv[2])
ids = mx.array([[int(i) for i in sys.argv[3].split()]])
np.save(sys.argv[4], np.array(model(ids).astype(mx.float32))[0, -1])
"""


@pytest.mark.skipif(not MLX, reason="LITPEFT_MLX_PYTHON names an interpreter with mlx-lm")
def test_mlx_lm_computes_with_the_adapter_what_the_run_computes(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    run = finetune(base, tmp_path, *LEARN, *EVERYWHERE)
    out = adapter(run, tmp_path / "mlx", "mlx")
    argv = [MLX, "-c", IN_MLX, str(base), str(out), " ".join(map(str, PROMPT)), str(tmp_path / "logits.npy")]
    subprocess.run(argv, check=True)
    import numpy as np

    got = torch.from_numpy(np.load(tmp_path / "logits.npy")).log_softmax(-1)
    want = of_model(load_model(str(run), precision="32-true").model, PROMPT)
    assert (got - want).abs().max() <= 2e-3  # MLX multiplies in lower precision
    assert (of_model(build(base, torch.float32), PROMPT) - want).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "method", "options", "to", "said"),
    [
        ("llama", "dora", (), "gguf-adapter", "is no update of low rank alone"),
        ("llama", "adapter", (), "mlx", "blocks.0.attn.core acts on activations"),
        ("llama", "lora", ("--method.unfreeze", '["*norm*"]'), "mlx", "it trained weights of the base, too: "),
        ("gpt2", "lora", (), "mlx", "is fused or transposed in transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused_by_name(tmp_path, family, method, options, to, said) -> None:
    make_family(tmp_path / "base", family)
    run = finetune(write_bpe(tmp_path / "base"), tmp_path, "--train.max_steps", "1", *options, method=method)
    with pytest.raises(ModelError, match=f"this run is nothing that {to} has: ") as error:
        adapter(run, tmp_path / "out", to)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_of_a_run(tiny_folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="mlx is for what a run learned beside its base"):
        adapter(tiny_folder, tmp_path / "out", "mlx")
    with pytest.raises(ValueError, match="dtype is not for --to mlx"):
        adapter(tiny_folder, tmp_path / "out", "mlx", dtype="float16")
