"""Weights that were damaged into other finite numbers are noticed wherever a folder is read."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder
from safetensors.torch import load_file

from litpeft.core.checksums import CHECKSUMS, tell_unverified
from litpeft.core.errors import UserError
from litpeft.core.safetensors import Weights, write_safetensors
from litpeft.exchange.convert import convert
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.model.build import build

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A tiny model's folder as `convert` writes it."""
    source = make_folder(tmp_path_factory.mktemp("source") / "bin")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(Convert(str(source), str(source.parent / "hf")))
    return source.parent / "hf"


def damaged(folder: Path, out: Path) -> Path:
    """Returns a copy of a folder in which the lowest bit of one number's exponent is another."""
    shutil.copytree(folder, out)
    weights = Weights(folder)
    path = out / weights.file_of[NAME]
    content = bytearray(path.read_bytes())
    content[weights.headers[path.name][NAME]["data_offsets"][0] + 2] ^= 0x80
    path.write_bytes(content)
    assert load_file(path)[NAME].isfinite().all()
    assert not torch.equal(load_file(path)[NAME], weights.read(NAME))
    return out


def test_the_checksums_are_those_of_every_tensors_bytes(converted, tmp_path):
    tensors = load_file(converted / "model.safetensors")
    want = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert json.loads((converted / CHECKSUMS).read_text())["tensors"] == want
    assert Weights(converted).verified_sums() == want
    write_safetensors(tmp_path, tensors.items(), shard_bytes=60_000)  # however they are sharded
    assert json.loads((tmp_path / CHECKSUMS).read_text())["tensors"] == want


def test_damage_is_named_by_file_and_tensor_in_every_command_that_reads_the_folder(converted, tmp_path, capsys):
    folder = damaged(converted, tmp_path / "damaged")
    for use in (build, lambda path, dtype: load_model(str(path)), lambda path, dtype: Weights(path).fingerprint()):
        with pytest.raises(UserError, match=f"model.safetensors: {NAME} changed since .*sha256 mismatch") as error:
            use(folder, torch.float32)
        assert error.value.exit_code == 4
    for more in ((), ("--dry_run", "true")):
        with pytest.raises(SystemExit, match="4"):
            finetune(folder, tmp_path, "--train.epochs", "1", *more)
        assert f"{NAME} changed since" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_was_merged_is_verified_too_and_a_whole_folder_says_nothing(converted, tmp_path, capsys):
    from litpeft.cli import main

    run = finetune(converted, tmp_path, "--train.epochs", "1")
    main(["merge", str(run)])
    assert load_model(str(run / "merged")).model.config.n_layers == 2
    assert "unverified" not in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{NAME} changed since"):
        load_model(str(damaged(run / "merged", tmp_path / "damaged")))


def test_a_folder_without_checksums_is_called_unverified_once(tiny_folder, capsys):
    tell_unverified.cache_clear()
    for _ in range(2):
        build(tiny_folder, torch.float32)
        Weights(tiny_folder).fingerprint()
    assert capsys.readouterr().err.count(f"{tiny_folder} is unverified: it has no checksums.json") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "checksums.json cannot be read"),
        ('{"tensors": [1]}', "tensors must map names to their sha256"),
        ('{"tensors": {"a": "0"}}', "do not hold the same tensors: a, lm_head.weight"),
    ],
)
def test_checksums_that_do_not_fit_are_named(converted, tmp_path, content, message):
    shutil.copytree(converted, tmp_path / "m")
    (tmp_path / "m" / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=message):
        build(tmp_path / "m", torch.float32)


def test_a_shard_may_be_a_link_to_wherever_it_lies_and_one_that_leads_nowhere_is_named(converted, tmp_path):
    """The hub's own cache is made of links: snapshots/COMMIT/model.safetensors -> ../../blobs/SHA256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in converted.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(build(snapshot, torch.float32)(ids), build(converted, torch.float32)(ids))
    (blobs / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is a link to .*blobs/model.safetensors, which is not there"):
        build(snapshot, torch.float32)
