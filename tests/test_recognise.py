"""What is no plain model folder is called by its name, with the command that takes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import finetune
from safetensors.torch import load_file, save_file

from litpeft.cli import main
from litpeft.core.errors import UserError
from litpeft.exchange.merge import merge
from litpeft.exchange.settings import Convert, Merge
from litpeft.generate.load import load_model
from litpeft.model.families.read import read_config


def refused(call, *args: object) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert error.value.exit_code in (2, 4)
    return str(error.value)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    """What peft's save_pretrained leaves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_model.safetensors",),
        ("adapter_config.json", "adapters.safetensors"),  # as MLX writes it
        ("adapters.safetensors",),
    ],
)
def test_an_adapter_beside_full_weights_is_refused_by_every_command(tiny_folder, adapter, tmp_path, names):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    for name in names:
        shutil.copy(adapter / name.replace("adapters.", "adapter_model."), folder / name)
    what = f"holds an adapter ({', '.join(names)}) beside full weights"
    from litpeft.exchange.convert import convert

    for call, arg in ((read_config, folder), (load_model, str(folder)), (merge, Merge(str(folder)))):
        assert what in refused(call, arg)
    assert what in refused(convert, Convert(str(folder), str(tmp_path / "out")))


def test_an_adapter_alone_is_told_with_its_base_and_what_to_do(adapter, tiny_folder, tmp_path):
    message = refused(read_config, adapter)
    files = "adapter_config.json, adapter_model.safetensors"
    assert f"this is an adapter of {tiny_folder} ({files}), and a model folder is asked for" in message
    assert f"`litpeft merge {adapter}` makes one of it" in message
    other = shutil.copytree(adapter, tmp_path / "mlx")
    (other / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')  # as MLX writes it
    for call, arg in ((read_config, other), (load_model, str(other)), (merge, Merge(str(other)))):
        message = refused(call, arg)
        assert f"this is an adapter ({files}), which litpeft does not read" in message
        assert "merge_and_unload" in message


@pytest.mark.parametrize("kind", ["hqq", "aqlm", "bitsandbytes"])
def test_quantised_weights_are_named_by_their_method(tiny_folder, tmp_path, kind):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": kind, "bits": 4}}))
    message = refused(load_model, str(folder))
    assert f"the weights are already quantised ({kind})" in message
    assert "base.quantize" in message
    path.write_text(json.dumps(config | {"quantization_config": None}))
    assert load_model(str(folder)).model.config.n_layers == 2


def test_quantised_weights_that_config_json_does_not_tell_of_are_told(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].view(torch.uint8)[:, ::8].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(load_model, str(folder))
    assert f"{name} is U8" in message
    assert "they seem to be quantised: take the model's plain weights" in message


@pytest.mark.parametrize("name", ["x.gguf", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_other_weights_beside_config_json_name_the_command_that_converts_them(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "v1.5")
    (folder / "model.safetensors").rename(folder / name)
    source, out = (folder / name, folder / "x") if name == "x.gguf" else (folder, tmp_path / "v1.5-safetensors")
    assert f"hint: `litpeft convert {source} {out}` makes a model folder of it" in refused(load_model, str(folder))


def test_a_folder_without_config_json_is_told_so_first(tiny_folder, tmp_path):
    assert "config.json: there is no config.json of a model" in refused(load_model, str(tmp_path))


def test_gguf_files_and_folders_of_them_name_the_command_that_converts(tmp_path):
    file = tmp_path / "a model" / "x.Q4_K_M.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    command = f"litpeft convert '{file}' '{file.with_suffix('')}'"
    assert f"this is a GGUF file\nhint: `{command}`" in refused(load_model, str(file))
    message = refused(load_model, str(file.parent))
    assert "this is a folder of GGUF files: x.Q4_K_M.gguf" in message
    assert command in message


def test_a_run_as_base_names_merge_or_the_folder_that_is_a_model(tiny_folder, tmp_path, capsys):
    run = finetune(tiny_folder, tmp_path, "--train.epochs", "1")
    for part in (run, run / "final"):
        message = refused(read_config, part)
        assert "this is a run, and a model folder is asked for" in message
        assert f"`litpeft merge {run}` makes a model of it" in message
    checkpoint = next((run / "checkpoints").glob("step-*"))
    assert "this is a checkpoint of a run" in refused(load_model, str(checkpoint))
    main(["merge", str(run)])
    assert f"give {run / 'merged'}" in refused(read_config, run)
    with pytest.raises(SystemExit, match="4"):
        finetune(run, tmp_path, out="second")
    assert f"give {run / 'merged'}" in capsys.readouterr().err
    full = finetune(tiny_folder, tmp_path, "--train.epochs", "1", out="full", method="full")
    assert f"give {full / 'final'}" in refused(read_config, full)
    assert read_config(full / "final")[1].n_layers == 2
    assert "no run but a model folder" in refused(merge, Merge(str(tiny_folder)))


def test_a_folder_around_the_model_names_the_model(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "models--org--tiny" / "snapshots" / "abc")
    inside = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    assert f"hint: give {inside}" in refused(load_model, str(tmp_path / "models--org--tiny"))


def test_shards_without_an_index_name_the_index(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    message = refused(load_model, str(folder))
    assert "there are shards (model-00001-of-00002.safetensors, model-00002-of-00002.safetensors)" in message
    assert "their index model.safetensors.index.json is missing" in message


def test_weights_of_another_name_are_told(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "tiny.safetensors")
    assert "rename it to model.safetensors" in refused(load_model, str(folder))
    assert "a file of weights; a model is the folder" in refused(load_model, str(folder / "tiny.safetensors"))


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_number_that_is_not_finite_is_named_by_file_and_tensor(tiny_folder, tmp_path, storage):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(load_model, str(folder), None, "auto", storage)
    assert f"{folder / 'model.safetensors'}: model.layers.1.mlp.up_proj.weight holds numbers that are not" in message
