"""BitFit against transformers: training its biases is training ours; and the biases that a model gets."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, finetune, in_float64, make_folder
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.generate.load import load_model
from litpeft.methods.bitfit import BitFit
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.delta import attach, trainable
from litpeft.model.gpt import GPT

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """A model with biases, far from zero."""
    folder = tmp_path_factory.mktemp("models") / request.param
    make_folder(folder, **BIASED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if request.param == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def test_after_steps_of_sgd_it_is_transformers_model_whose_biases_took_them(folder: Path) -> None:
    ours = build(folder, torch.float64, BitFit())
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    biases = [parameter for name, parameter in theirs.named_parameters() if name.endswith("bias")]
    assert sum(p.numel() for p in trainable(ours).values()) == sum(p.numel() for p in biases)
    weight = torch.randn(2, 24, 320, dtype=torch.float64)
    start = ours(IDS)
    for parameters, logits in ((list(trainable(ours).values()), ours), (biases, lambda ids: theirs(ids).logits)):
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (logits(IDS) * weight).sum().backward()
            optimizer.step()
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - start).abs().max() > 1e-2 * want.abs().max()
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()


def test_the_biases_of_gpt2_are_as_many_as_the_paper_counts() -> None:
    sizes = {"vocab_size": 50257, "d_model": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "head_dim": 64}
    switches = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "gated_mlp": False, "norm": "layer"}
    with torch.device("meta"):
        model = GPT(ModelConfig(**sizes, **switches, d_ff=3072, max_positions=1024, tie_embeddings=True))
        attach(model, BitFit())
    assert sum(p.numel() for p in trainable(model).values()) == 102_144


def test_a_model_without_biases_is_refused_unless_they_are_asked_for(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no biases to train\nhint: --method.add_missing true"):
        build(tiny_folder, torch.float32, BitFit())
    model = build(tiny_folder, torch.float32, BitFit(add_missing=True))
    assert sum(p.numel() for p in trainable(model).values()) == 2 * (64 + 32 + 32 + 64 + 112 + 112 + 64)


def test_only_the_biases_of_the_targets_train(folder: Path) -> None:
    model = build(folder, torch.float32, BitFit(targets=("*.attn.q", "*.mlp.up"), norms=False))
    assert {name.split(".", 2)[2] for name in trainable(model)} == {"attn.q.slot.bitfit.d", "mlp.up.slot.bitfit.d"}


def test_a_merge_writes_the_biases_that_a_model_got_and_zeros_beside_them(tiny_folder: Path, tmp_path: Path) -> None:
    learn = "--train.epochs", "3", "--train.lr", "1e-2", "--method.targets", '["*.attn.q", "*.mlp.down"]'
    run = finetune(tiny_folder, tmp_path, *learn, method="bitfit")
    main(["merge", str(run)])
    said = json.loads((run / "merged" / "config.json").read_text())
    assert said["attention_bias"] is said["mlp_bias"] is True
    theirs, info = AutoModelForCausalLM.from_pretrained(run / "merged", output_loading_info=True)
    assert not any(info.values())
    layer = theirs.model.layers[1]
    assert layer.self_attn.q_proj.bias.any()
    assert layer.mlp.down_proj.bias.any()
    assert not any(m.bias.any() for m in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.gate_proj))
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        assert (theirs(IDS).logits - want).abs().max() <= 5e-6 * want.abs().max()


def test_a_combination_with_it_merges_too(tiny_folder: Path, tmp_path: Path) -> None:
    methods = '{"lora": {"targets": ["*.attn.v"]}, "bitfit": {"add_missing": true}}'
    learn = "--train.epochs", "3", "--train.lr", "1e-2", "--method.methods", methods
    run = finetune(tiny_folder, tmp_path, *learn, method="combo")
    main(["merge", str(run)])
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        theirs = AutoModelForCausalLM.from_pretrained(run / "merged")(IDS).logits
    assert (theirs - want).abs().max() <= 5e-6 * want.abs().max()


def test_a_family_whose_files_hold_no_biases_is_refused_in_a_merge(tmp_path: Path, capsys) -> None:
    folder = make_folder(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    run = finetune(folder, tmp_path, method="bitfit")
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(run)])
    assert stop.value.code == 4
    assert "adds blocks.0.attn.q.bias, which this family's files have no place for" in capsys.readouterr().err
    assert not (run / "merged").exists()
