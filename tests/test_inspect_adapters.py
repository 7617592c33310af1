"""`inspect` and `diff` of adapters: what peft computes with the same files, and every way out that there is."""

import json
import shutil

import pytest
import torch
from chat_samples import bpe
from conftest import finetune, make_folder
from families.tiny_families import make_family
from peft import LoraConfig, PromptTuningConfig
from random_adapter import write_adapter
from safetensors.torch import load_file

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.core.exports import EXPORTS
from litpeft.exchange.diff import opened
from litpeft.exchange.inspect import as_text, facts


@torch.no_grad()
def test_the_update_of_dora_is_what_peft_adds_to_the_weights_and_needs_the_base(tiny_folder, tmp_path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = write_adapter(tiny_folder, tmp_path / "dora", config)
    before = {name: tensor.clone() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    after = model.merge_and_unload().state_dict()
    found = facts(tmp_path / "dora")
    assert found["family"] == "llama"
    assert len(found["updates"]) == 4
    for ours, theirs in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
        key = f"model.layers.1.{theirs}.weight"
        change = after[key].double() - before[key].double()
        assert found["updates"][f"blocks.1.{ours}.weight"]["norm"] == pytest.approx(float(change.norm()), rel=1e-4)
    path = tmp_path / "dora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/gone"}))
    alone = facts(tmp_path / "dora")
    assert alone["updates"] == {}
    assert "its base model org/gone is not there" in "\n".join(as_text(alone))
    assert facts(tmp_path / "dora", str(tiny_folder))["updates"] == found["updates"]


def test_a_pickled_adapter_is_described_as_the_same_in_safetensors(tiny_folder, tmp_path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    write_adapter(tiny_folder, tmp_path / "safe", config)
    shutil.copytree(tmp_path / "safe", tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin" / "adapter_model.safetensors"), tmp_path / "bin" / "adapter_model.bin")
    (tmp_path / "bin" / "adapter_model.safetensors").unlink()
    safe, pickled = facts(tmp_path / "safe"), facts(tmp_path / "bin")
    assert [pickled[key] for key in ("parameters", "dtypes", "tensors", "updates")] == [
        safe[key] for key in ("parameters", "dtypes", "tensors", "updates")
    ]
    with pytest.raises(ModelError, match=r"there is no adapter_model.safetensors"):
        opened(tmp_path / "bin")


def test_every_way_out_is_a_command_that_works_or_a_reason_that_it_gives(tiny_folder, tmp_path, capsys) -> None:
    write_adapter(tiny_folder, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    write_adapter(tiny_folder, tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    fused = make_folder(
        tmp_path / "gpt2", model_type="gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=64, activation_function="relu"
    )
    run = finetune(fused, tmp_path, out="run")
    for folder in (tmp_path / "lora", tmp_path / "prompt", run):
        ways = facts(folder)["exports"]
        assert folder.name == "prompt" or {*ways} - {"safetensors", "lora"} == {*EXPORTS}
        assert any(way.startswith("litpeft ") for way in ways.values())
        for to, way in ways.items():
            if to not in EXPORTS:
                continue
            argv = ["convert", str(folder), str(tmp_path / f"{folder.name} {to}"), "--to", to, "--no_verify"]
            capsys.readouterr()
            if way.startswith("no: "):
                with pytest.raises(SystemExit):
                    main(argv)
                assert way.removeprefix("no: ") in capsys.readouterr().err
            else:
                assert way == f"litpeft convert {folder} --to {to}"
                main(argv)
    assert facts(tiny_folder)["exports"]["gguf"].startswith("no: this tokenizer is none that is written to GGUF")
    make_family(tmp_path / "other", "gpt2", activation_function="relu")
    assert facts(tmp_path / "other")["exports"]["gguf"].startswith("no: llama.cpp's gpt2 computes with activation")
    plain = tmp_path / "plain"
    make_family(plain, "llama", vocab_size=512)
    bpe(["<|endoftext|>"]).save(str(plain / "tokenizer.json"))
    ways = facts(plain)["exports"]
    assert ways == {"gguf": f"litpeft convert {plain} --to gguf"}
    main(["convert", str(plain), "--to", "gguf", "--no_verify"])


def test_an_adapter_of_mlx_is_named(tiny_folder, tmp_path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    write_adapter(tiny_folder, tmp_path / "lora", config)
    main(["convert", str(tmp_path / "lora"), str(tmp_path / "mlx"), "--to", "mlx"])
    for read in (facts, opened):
        with pytest.raises(ModelError, match=r"adapters.safetensors\), which litpeft does not read") as error:
            read(tmp_path / "mlx")
        assert "mlx_lm.fuse" in error.value.hint


def test_a_label_is_apart_from_what_it_labels(tiny_folder, tmp_path) -> None:
    write_adapter(tiny_folder, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    found = facts(tmp_path / "lora")
    lines = as_text(found)
    for to, way in found["exports"].items():
        assert [line.split() for line in lines if line.startswith(f"to {to} ")] == [["to", to, *way.split()]]
