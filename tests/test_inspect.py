"""`inspect` and `diff` against what transformers, peft and torch say of the same files."""

import json
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.safetensors import Weights
from litpeft.exchange.run import build_run, find_run


def told(capsys, *argv: object) -> dict:
    """Returns what a command prints with --json."""
    capsys.readouterr()
    main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: finetune(tiny_folder, folder, method=name, out=name) for name in ("lora", "dora", "full", "prefix")}


def test_a_base_is_described_as_transformers_counts_it(tiny_folder, capsys) -> None:
    found = told(capsys, "inspect", tiny_folder)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert (found["kind"], found["family"]) == ("model", "llama")
    assert found["parameters"] == theirs.num_parameters()
    assert {name: tuple(one["shape"]) for name, one in found["tensors"].items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()
    }
    assert found["dtypes"] == {"F32": found["parameters"]}
    assert found["bytes"] == (tiny_folder / "model.safetensors").stat().st_size
    assert found["fingerprint"] == Weights(tiny_folder).fingerprint()
    main(["inspect", str(tiny_folder)])
    assert "d_model 64" in capsys.readouterr().out


def test_a_model_that_litpeft_does_not_read_is_described_with_the_reason(tiny_folder, tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "xlnet"}))
    found = told(capsys, "inspect", folder)
    assert found["family"] == "xlnet"
    assert "model_type 'xlnet' is not supported" in found["refused"]
    assert found["parameters"] == told(capsys, "inspect", tiny_folder)["parameters"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "dora", "full"])
def test_the_updates_of_a_run_are_those_of_its_merged_weights(name: str, runs, tiny_folder, tmp_path, capsys) -> None:
    found = told(capsys, "inspect", runs[name])
    merged = runs[name] / "final"
    if name != "full":
        merged = tmp_path / "merged"
        main(["merge", str(runs[name]), "--out", str(merged), "--dtype", "float32"])
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, merged))
    key = "model.layers.1.self_attn.q_proj.weight"
    change = after[key].double() - before[key].double()
    values = torch.linalg.svdvals(change)
    share = values / values.sum()
    got = found["updates"]["blocks.1.attn.q.weight"]
    assert got["norm"] == pytest.approx(float(change.norm()), rel=1e-3)
    assert got["share"] == pytest.approx(float(change.norm() / before[key].double().norm()), rel=1e-3)
    if name != "lora":  # whose other singular values are the rounding of the merged file
        entropy = float(-(share * share.clamp(min=1e-300).log()).sum())
        assert got["effective_rank"] == pytest.approx(torch.tensor(entropy).exp().item(), rel=2e-2)
    else:
        assert 1 <= got["effective_rank"] <= found["settings"]["rank"]
    assert found["method"] == name
    assert found["base"]["fingerprint"] == Weights(tiny_folder).fingerprint()


def test_each_export_of_a_run_is_a_command_that_exists_or_a_reason(runs, capsys) -> None:
    ways = told(capsys, "inspect", runs["lora"])["exports"]
    assert ways["safetensors"] == f"litpeft merge {runs['lora']}"
    assert [ways[to].partition(" --")[2] for to in ("mlx", "peft")] == ["to mlx", "to peft"]
    assert ways["gguf"].startswith("no: this tokenizer is none that is written to GGUF")
    found = told(capsys, "inspect", runs["prefix"])
    assert "acts on activations" in found["exports"]["safetensors"]
    assert "updates" not in found
    main(["inspect", str(runs["lora"])])
    assert "effective rank" in capsys.readouterr().out


def test_an_adapter_of_peft_has_the_norms_of_its_delta_weights(tiny_folder, tmp_path, capsys) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 2},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    model.save_pretrained(tmp_path)
    found = told(capsys, "inspect", tmp_path)
    assert (found["kind"], found["method"]) == ("PEFT adapter", "LORA")
    assert len(found["updates"]) == 4
    for name, one in found["updates"].items():
        layer = model.base_model.model.get_submodule(name)
        assert one["norm"] == pytest.approx(float(layer.get_delta_weight("default").double().norm()), rel=1e-5)


def test_a_gguf_file_is_described_and_damage_is_an_error(tmp_path, capsys) -> None:
    from tiny_gguf import digits, llama, write_gguf

    path = write_gguf(tmp_path / "model.gguf", llama(), digits())
    found = told(capsys, "inspect", path)
    assert (found["kind"], found["family"], found["config"]["block_count"]) == ("GGUF file", "llama", 2)
    assert found["exports"]["safetensors"].startswith("litpeft convert ")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "cut.gguf")])
    assert stop.value.code == 4


def test_diff_names_the_settings_the_tokenizer_and_the_tensors(tiny_folder, tmp_path, capsys) -> None:
    assert told(capsys, "diff", tiny_folder, tiny_folder) | {"a": "", "b": ""} == {
        "a": "", "b": "", "settings": [], "tokenizer": [], "equal": 21, "only_a": [], "only_b": [], "tensors": {}
    }  # fmt: skip
    other = make_folder(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][3, 5] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_start|>"}))
    found = told(capsys, "diff", tiny_folder, other)
    assert found["settings"] == ["rms_norm_eps: 1e-06 -> 1e-05"]
    assert [line.split(":")[0] for line in found["tokenizer"]] == ["stop_ids"]
    assert found["equal"] == 20
    assert found["tensors"][key]["largest"] == pytest.approx(0.25, abs=1e-6)
    assert found["tensors"][key]["share"] == pytest.approx(0.25 / float(tensors[key].double().norm()), rel=1e-2)
    main(["diff", str(tiny_folder), str(other)])
    assert "tensors: 20 the same, 1 differ" in capsys.readouterr().out


def test_diff_of_two_runs_names_the_method_and_of_two_kinds_is_refused(runs, tiny_folder, capsys) -> None:
    found = told(capsys, "diff", runs["lora"], runs["dora"])
    assert 'method: "lora" -> "dora"' in found["settings"]
    assert found["tokenizer"] == []
    delta = build_run(find_run(runs["dora"]), tiny_folder, torch.float32).delta_keys
    assert set(found["only_b"]) <= delta
    with pytest.raises(SystemExit) as stop:
        main(["diff", str(runs["lora"]), str(tiny_folder)])
    assert stop.value.code == 4
    assert "litpeft merge" in capsys.readouterr().err
