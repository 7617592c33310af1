"""The packed weights of a base on disk: what is read is what was written, or nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from litpeft.core.errors import ModelError
from litpeft.model.quantize.cache import Cache
from litpeft.model.quantize.codes import quantize_4bit, quantize_absmax


def packed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    codes, absmax = quantize_4bit(torch.randn(96, 70), "nf4")
    codes8, scale, offset = quantize_absmax(absmax)
    tensors = {"weight": codes, "absmax": codes8, "absmax_scale": scale, "absmax_offset": offset}
    return {f"blocks.0.attn.q.{name}": tensor for name, tensor in tensors.items()}


def written(folder: Path) -> Cache:
    cache = Cache(folder, "nf4-dq", "f1")
    cache.write(packed())
    return cache


def test_what_is_read_has_the_bits_that_were_written(tmp_path) -> None:
    file = written(tmp_path).tensors()
    assert set(file.keys()) == set(packed())
    for name, tensor in packed().items():
        assert file.get_tensor(name).dtype == tensor.dtype
        assert torch.equal(file.get_tensor(name), tensor)
    facts = json.loads((tmp_path / "litpeft-nf4-dq" / "packed.json").read_text())
    assert set(facts) == {"format", "key", "fingerprint", "sha256", "litpeft"}


def test_where_there_is_none_nothing_is_said(tmp_path, capsys) -> None:
    assert Cache(tmp_path, "nf4", "f1").tensors() is None
    assert capsys.readouterr().out == ""


def damage_bytes(folder: Path) -> None:
    content = bytearray((folder / "packed.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "packed.safetensors").write_bytes(content)


def damage_length(folder: Path) -> None:
    os.truncate(folder / "packed.safetensors", (folder / "packed.safetensors").stat().st_size - 9)


def damage_description(folder: Path) -> None:
    (folder / "packed.json").write_text("{")


def change(**facts: object):
    def apply(folder: Path) -> None:
        old = json.loads((folder / "packed.json").read_text())
        (folder / "packed.json").write_text(json.dumps(old | facts))

    return apply


CASES = {
    "a flipped bit": (damage_bytes, "sha256 mismatch"),
    "a short file": (damage_length, "not a whole safetensors file"),
    "no weights": (lambda folder: (folder / "packed.safetensors").unlink(), "missing"),
    "no description": (lambda folder: (folder / "packed.json").unlink(), "there is no description"),
    "half a description": (damage_description, "cannot be read"),
    "another base": (change(fingerprint="f0"), "its fingerprint is 'f0', not 'f1'"),
    "another storage": (change(key="fp4"), "its key is 'fp4', not 'nf4-dq'"),
    "another format": (change(format=99), "its format is 99, not 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_ignored_with_one_line_and_made_anew(case: str, tmp_path, capsys) -> None:
    cache = written(tmp_path)
    spoil, words = CASES[case]
    spoil(cache.folder)
    assert cache.tensors() is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert words in said
    cache.write(packed())
    assert cache.tensors() is not None
    assert [p.name for p in tmp_path.iterdir()] == ["litpeft-nf4-dq"]


def test_two_storages_of_one_base_lie_beside_each_other(tmp_path) -> None:
    written(tmp_path)
    other = Cache(tmp_path, "nf4", "f1")
    other.write({"x": torch.ones(3)})
    assert set(other.tensors().keys()) == {"x"}
    assert len(written(tmp_path).tensors().keys()) == 4


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path) -> None:
    cache = written(tmp_path)
    (cache.folder / "notes.txt").write_text("mine")
    with pytest.raises(ModelError) as error:
        cache.write(packed())
    assert "which litpeft did not write: it is not replaced" in error.value.what
    assert (cache.folder / "notes.txt").read_text() == "mine"


def test_what_cannot_be_written_is_one_line(tmp_path) -> None:
    (tmp_path / "base").write_text("a file where the base's folder should be")
    with pytest.raises(ModelError) as error:
        Cache(tmp_path / "base", "nf4", "f1").write(packed())
    assert "the packed weights cannot be written" in error.value.what


def test_parameters_are_written_without_copies(tmp_path, monkeypatch) -> None:
    tensor, seen = torch.nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False), []
    from litpeft.model.quantize import cache as module

    save = module.save_tensors
    monkeypatch.setattr(module, "save_tensors", lambda t, path: seen.append(t["x"].data_ptr()) or save(t, path))
    Cache(tmp_path, "nf4", "f1").write({"x": tensor})
    assert seen == [tensor.data_ptr()]
    with safe_open(tmp_path / "litpeft-nf4" / "packed.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor)
