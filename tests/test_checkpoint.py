"""Model files: what is whole is read, what is not is named, and folders appear as a whole or not at all."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file, save_file

from litpeft.core import safetensors as checkpoint
from litpeft.core.errors import UserError
from litpeft.core.folders import atomic_folder
from litpeft.core.safetensors import Weights, write_safetensors
from litpeft.model.build import build
from litpeft.model.families.read import read_config


def test_shards_hold_the_same_tensors_and_have_the_same_fingerprint(tiny_folder, tmp_path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    write_safetensors(tmp_path, tensors.items(), shard_bytes=60_000)
    sharded = Weights(tmp_path)
    assert len(sharded.headers) > 2
    assert all(torch.equal(sharded.read(name), tensor) for name, tensor in tensors.items())
    assert sharded.fingerprint() == Weights(tiny_folder).fingerprint()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    tensors["model.norm.weight"][0] += 1
    write_safetensors(tmp_path, tensors.items())
    (tmp_path / "checksums.json").unlink()  # those of the new file
    assert Weights(tmp_path).fingerprint() == sharded.fingerprint()  # the index still names the shards
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"][0] == tensors["model.norm.weight"][0]


def test_tensors_are_read_again_after_their_pages_were_dropped(tmp_path) -> None:
    tensors = {"odd": torch.randn(3, 5), "half": torch.randn(999).bfloat16(), "one": torch.tensor(2.5)}
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    header, end = {}, 0
    for (name, tensor), kind in zip(tensors.items(), ("F32", "BF16", "F32"), strict=True):
        offsets, end = [end, end + tensor.nbytes], end + tensor.nbytes
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
    words = json.dumps(header).encode()
    words += b" " * (len(words) % 2 == 0)  # older files begin their tensors anywhere
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(words)) + words + data)
    weights = Weights(tmp_path)
    read = {name: weights.read(name) for name in tensors}
    for _ in range(2):
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        weights.drop_pages()


def test_tensors_of_several_types_are_read_by_the_library(tmp_path) -> None:
    torch.manual_seed(0)
    types = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    tensors = {f"t{n}": torch.randn(3, n + 1).to(types[n % 4]) for n in range(24)}
    tensors |= {"one": torch.tensor(2.5), "none": torch.empty(0, 3), "transposed": torch.randn(4, 6).t()}
    write_safetensors(tmp_path, tensors.items())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4  # one for each type
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_a_full_disk_is_told(tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"the disk is full \(File too large\)"):
            write_safetensors(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(100_000)}.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_header_that_is_full_begins_another_shard(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "HEADER_BYTES", 8192 - 8)
    tensors = {f"a.rather.long.name.of.a.tensor.{n}": torch.full((2,), float(n)) for n in range(100)}
    write_safetensors(tmp_path, tensors.items())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    weights = Weights(tmp_path)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin"])
def test_an_index_that_points_outside_is_refused(tiny_folder, tmp_path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"only a \*.safetensors file of the same folder is allowed"):
        Weights(tmp_path)


def broken(folder: Path, change) -> Path:
    make_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"is \(3,\), config.json says \(64,\)"),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "model.extra.weight is not of this architecture"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named_before_anything_runs(tmp_path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(broken(tmp_path / "m", change), torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "bloom"}', "model_type 'bloom' is not supported; litpeft has llama"),
        ('{"model_type": "llama", "rope_scaling": {"type": "linear"}}', "the key 'rope_scaling.factor' is missing"),
        ("{", "cannot be read"),
        ("[1]", "must be a JSON object"),
        (None, "there is no config.json"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tiny_folder, tmp_path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        build(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported; it must be "silu" or "swish"'),
        (
            {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
            'rope_parameters.rope_type "ntk" is not supported',
        ),
        ({"num_attention_heads": 64, "head_dim": None}, "head_dim is hidden_size 64 / num_attention_heads 64 unless"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"quantization_config": {}}, "already quantised"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1 is not supported; it must be a whole number"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(tiny_folder, tmp_path, change: dict, message: str) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        build(tmp_path, torch.float32)


def test_a_quantization_config_of_null_says_that_the_weights_are_plain(tiny_folder, tmp_path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == read_config(tiny_folder)


def test_a_damaged_file_is_one_clear_error_or_differs_in_its_fingerprint(tiny_folder, tmp_path) -> None:
    whole = (tiny_folder / "model.safetensors").read_bytes()
    want, chance = Weights(tiny_folder).fingerprint(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(3)):
            if data:
                data[chance.randrange(min(len(data), chance.choice([16, 3000, len(data)])))] ^= 1 << chance.randrange(8)
        (tmp_path / "model.safetensors").write_bytes(data)
        if data == whole:
            continue
        try:
            got = Weights(tmp_path).fingerprint()
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:
            assert got != want or json.loads(data[8:].split(b"}}")[0] + b"}}")  # metadata may differ


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "out"

    def fail_half_way() -> None:
        with atomic_folder(target) as folder:
            (folder / "a").write_text("half")
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fail_half_way)
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("old")
    with pytest.raises(UserError, match="the output exists"), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as folder:
        assert (target / "config.json").read_text() == "old"
        (folder / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="holds b, which litpeft did not write"), atomic_folder(target, overwrite=True):
        pass


def test_what_a_killed_process_left_is_cleared_and_a_folder_moved_aside_comes_back(tmp_path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tmp-out-{dead.pid}").mkdir()
    (tmp_path / f".tmp-out-{dead.pid}-old").mkdir()
    (tmp_path / f".tmp-out-{dead.pid}-old" / "a").write_text("old")
    (tmp_path / f".tmp-out-{os.getppid()}").mkdir()  # its process lives: not ours to touch
    with pytest.raises(UserError, match="the output exists"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".tmp-out-{os.getppid()}", "out"]
