"""Tensors that several threads read are those that safetensors' own reader returns, bit for bit."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from families.tiny_families import make_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from litpeft.core import to_device
from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.core.to_device import OnDevice
from litpeft.model import build as building
from litpeft.model.build import build, checked_files
from litpeft.model.quantize import Storage

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def shards(folder: Path) -> dict[str, Tensor]:
    """Writes two files with tensors of every dtype, of odd sizes, some longer than a chunk, some empty."""
    torch.manual_seed(0)
    shapes, tensors = ((), (0,), (3, 0), (1,), (7, 13), (129, 31), (4097,)), {}
    for dtype in DTYPES:
        for shape in shapes:
            tensors[f"{dtype}{list(shape)}"] = (100 * torch.rand(shape)).to(dtype)
    placed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: tensor for name, tensor in tensors.items() if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return tensors


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("ahead", [0, 1000, 1 << 29])
@pytest.mark.parametrize("chunk", [100, 4096, 1 << 23])
def test_tensors_are_those_of_safetensors_reader(chunk, ahead, tmp_path, monkeypatch):
    monkeypatch.setattr(to_device, "CHUNK", chunk)
    monkeypatch.setattr(to_device, "AHEAD", ahead)
    names = list(shards(tmp_path))
    want = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    order = [names[i] for i in torch.randperm(len(names)).tolist()]
    with OnDevice(Weights(tmp_path), [*order, *order[::3]], CPU) as files:
        for name in [*reversed(order), *order[::3], names[0]]:  # any order will do, and one time more than was said
            tensor = files.read(name)
            assert (tensor.dtype, tensor.shape) == (want[name].dtype, want[name].shape)
            assert torch.equal(bits(tensor), bits(want[name])), name


def test_no_more_is_read_ahead_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(to_device, "AHEAD", 1000)
    save_file({f"t{i:02}": torch.full((100,), float(i)) for i in range(20)}, tmp_path / "model.safetensors")
    with OnDevice(Weights(tmp_path), [f"t{i:02}" for i in range(20)], CPU) as files:
        for i in range(20):
            assert files.read(f"t{i:02}")[-1] == i
            assert len(files.begun) == min(2, 19 - i)
            assert files.bytes_ahead == 400 * len(files.begun)


def test_a_file_that_is_cut_while_it_is_read_is_named_and_nothing_is_left_open(tmp_path):
    names = [f"t{i}" for i in range(9)]
    save_file({name: torch.ones(1000) for name in names}, tmp_path / "model.safetensors")
    weights, before = Weights(tmp_path), (threading.active_count(), len(os.listdir("/proc/self/fd")))
    os.truncate(tmp_path / "model.safetensors", 20000)

    def read() -> None:
        with OnDevice(weights, names, CPU) as files:
            for name in names:
                files.read(name)

    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file: it ended at byte 20000"):
        read()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "phi3", "gpt_oss", "gemma4_text"])
@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_model_that_threads_have_read_is_the_mapped_one(family, storage, tmp_path, monkeypatch):
    make_family(tmp_path, family)
    storage = None if storage is None else Storage(storage)
    want = build(tmp_path, torch.bfloat16, storage=storage).state_dict()
    read: list[str] = []

    class Counted(OnDevice):
        def _begin(self, name: str) -> None:
            read.append(name)
            super()._begin(name)

    monkeypatch.setattr(building, "on_device", lambda weights, uses, device: Counted(weights, uses, CPU))
    found = build(tmp_path, torch.bfloat16, storage=storage).state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in found.items())
    _, weights, names = checked_files(tmp_path)
    assert sorted(read) == sorted(set(names.plain(weights, names.ours)))  # each once, though some hold several
