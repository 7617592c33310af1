"""Sums that begin before a command is imported are those that it compares, and begin only where it compares them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import finetune
from safetensors.torch import load_file, save_file

from litpeft.core import checksums
from litpeft.core.early_sums import begin_folders, compared
from litpeft.core.safetensors import Weights, write_safetensors
from litpeft.generate.load import load_model
from litpeft.model.build import build


@pytest.fixture
def counted(monkeypatch) -> list[tuple[str, int]]:
    """The file and first byte of each tensor that is hashed."""
    hashed, given = [], checksums.file_sha256

    def hash_file(path: Path, first: int = 0, *rest: object) -> str:
        hashed.append((path.name, first))
        return given(path, first, *rest)

    monkeypatch.setattr(checksums, "file_sha256", hash_file)
    return hashed


@pytest.fixture
def verified(tiny_folder, tmp_path) -> Path:
    """The tiny model in shards, with its checksums, beside a file that is none of them."""
    folder = tmp_path / "verified"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, tensors.items(), shard_bytes=60_000)
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


def test_each_tensor_is_hashed_once_and_none_of_files_that_are_not_read(verified, counted):
    begin_folders([verified])
    weights = Weights(verified)
    sums = weights.verified_sums()
    assert sums == json.loads((verified / "checksums.json").read_text())["tensors"]
    assert len(counted) == len(set(counted)) == len(sums)
    assert {file for file, _ in counted} == set(weights.headers)


def test_what_is_wrong_with_a_folder_is_left_to_those_who_read_it(verified, tmp_path, capfd):
    shard = next(iter(Weights(verified).headers))
    (verified / shard).write_bytes(b"no tensors")
    begin_folders([verified, tmp_path / "nowhere", tmp_path / ("long" * 99), tmp_path / "a\0b"])
    (verified / "model.safetensors.index.json").write_text("[")
    begin_folders([verified])
    assert capfd.readouterr() == ("", "")


def test_the_sums_of_a_plain_model_are_compared_if_there_are_any(tiny_folder, verified, tmp_path):
    assert compared(str(verified)) == [verified]
    for path in (tiny_folder, tmp_path / "nowhere", "long" * 99, "a\0b", ""):
        assert compared(str(path)) == []


def test_of_a_run_those_of_its_base_are_compared_or_its_own_if_it_is_a_model(tiny_folder, tmp_path):
    run = finetune(tiny_folder, tmp_path, "--train.epochs", "1")
    assert compared(str(run)) == compared(str(run / "final")) == [tiny_folder.resolve()]
    assert compared(str(run), "elsewhere") == [Path("elsewhere")]
    record = run / "final" / "delta.json"
    for content, want in (('{"holds": "model"}', [run / "final"]), ('{"base": 3}', []), ("{}", []), ("{", [])):
        record.write_text(content)
        assert compared(str(run)) == want


def test_a_model_without_checksums_is_not_hashed_to_answer(tiny_folder, counted):
    build(tiny_folder, torch.float32)
    load_model(str(tiny_folder))
    assert counted == []


def test_the_base_of_a_run_is_hashed_once_to_answer(verified, tmp_path, counted):
    run = finetune(verified, tmp_path, "--train.epochs", "1")
    checksums._sums.cache_clear()
    counted.clear()
    begin_folders(compared(str(run)))
    load_model(str(run))
    of_base = [part for part in counted if part[0] in Weights(verified).headers]
    assert len(of_base) == len(set(of_base)) == len(Weights(verified).file_of)
