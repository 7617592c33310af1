"""Tensors that several threads read are those that safetensors' own reader returns, bit for bit."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_folder
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

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    return make_folder(tmp_path / "wide", hidden_size=128, intermediate_size=256, vocab_size=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1000, 1 << 23])
def test_on_a_gpu_are_the_numbers_of_the_file(chunk: int, dtype: torch.dtype, wide_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(to_device, "CHUNK", chunk)
    monkeypatch.setattr(to_device, "AHEAD", 20 * chunk)
    want, found = (build(wide_folder, dtype, device=device).state_dict() for device in (CPU, CUDA))
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), want[name]) for name, tensor in found.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_tensor_is_not_written_over_while_kernels_still_read_it(tmp_path) -> None:
    tensors = {f"t{n:02}": torch.randint(0, 1 << 31, (1 << 22,)).float() for n in range(40)}  # of 16 MB
    save_file(tensors, tmp_path / "model.safetensors")
    delay, sums = torch.randn(4096, 4096, device=CUDA), []
    with OnDevice(Weights(tmp_path), tensors, CUDA) as files:
        for name in tensors:
            delay = (delay @ delay).clamp(-1, 1)
            sums.append(files.read(name).double().sum())  # the tensor is let go before its sum is computed
    assert [float(one) for one in sums] == [float(tensor.double().sum()) for tensor in tensors.values()]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_found_on_the_gpu(value: str, wide_folder: Path, tmp_path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(wide_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = float(value)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors: model.layers.1.mlp.up_proj.weight holds numbers"):
        build(folder, torch.bfloat16, device=CUDA)
