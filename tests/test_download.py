"""`litpeft download ORG/NAME` against a hub on this machine, with its faults."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from download_command import INDEX, MODEL, SHARDS, content, refused, run, small_disk, weights
from loopback_hub import Hub
from safetensors.numpy import load

from litpeft.core.errors import ConfigError, ModelError, ResourceError, UserError
from litpeft.core.folders import locked
from litpeft.core.safetensors import Weights

UNWANTED = {
    "README.md": b"# hi",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": weights(3),
    "model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/model.safetensors": weights(4),
    "../model-00009-of-00009.safetensors": weights(5),
    ".gitattributes": b"*",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({**MODEL, **UNWANTED}) as server:
        yield server


def test_hub_model_arrives_byte_for_byte_and_nothing_else_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path, "org/tiny", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "checkpoints/org/tiny") == MODEL
    assert sorted(hub.transfers()) == sorted(MODEL)
    assert {path.split("/", 5)[5] for _, path, *_ in hub.log if "/resolve/" in path} == set(MODEL)
    size = sum(map(len, MODEL.values())) / 1e3
    assert f"will download 6 files, {size:.1f} kB to checkpoints/org/tiny" in done.stdout
    assert done.stdout.endswith("next: litpeft chat checkpoints/org/tiny\n")


def test_the_checksums_of_what_the_hub_sent_are_kept_and_later_damage_is_named(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    kept = json.loads((tmp_path / "out/checksums.json").read_text())
    tensors = {name: array for shard in SHARDS for name, array in load(MODEL[shard]).items()}
    assert kept["tensors"] == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
    assert kept["of"].startswith("org/tiny@")
    assert Weights(tmp_path / "out").verified_sums() == kept["tensors"]
    (tmp_path / "out" / SHARDS[1]).write_bytes(MODEL[SHARDS[1]][:-1] + b"\x3f")
    with pytest.raises(UserError, match=f"{SHARDS[1]}: w2 changed since the file was downloaded"):
        Weights(tmp_path / "out").fingerprint()


def test_without_its_weights_a_model_is_its_config_and_tokenizer(hub: Hub, tmp_path: Path) -> None:
    wanted = {name: data for name, data in MODEL.items() if "safetensors" not in name}
    done = run(tmp_path, "org/tiny", "out", weights="false", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == wanted
    assert sorted(hub.transfers()) == sorted(wanted)
    assert done.stdout.endswith("next: litpeft new out out-new\n")
    again = run(tmp_path, "org/tiny", "out", weights="false", HF_ENDPOINT=hub.url)
    assert "already there, nothing to download" in again.stdout
    assert run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url).returncode == 0
    assert content(tmp_path / "out") == MODEL
    assert run(tmp_path, "org/tiny", "out", weights="false", HF_ENDPOINT=hub.url).returncode == 0
    assert content(tmp_path / "out") == MODEL
    for source in ("pypi:my-model", "datasets/dolly"):
        refused(run(tmp_path, source, weights="false"), ConfigError, "without its weights")


def test_one_process_at_a_time_downloads_into_a_folder(hub: Hub, tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        refused(run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url), ResourceError, f"process {os.getpid()} on")
    assert hub.transfers() == []


def test_second_run_transfers_nothing_with_and_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path, "org/tiny", HF_ENDPOINT=hub.url)
    hub.log.clear()
    again = run(tmp_path, "org/tiny", HF_ENDPOINT=hub.url)
    assert again.returncode == 0
    assert "already there, nothing to download" in again.stdout
    assert hub.transfers() == []
    offline = run(tmp_path, "org/tiny", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0
    assert "was not compared with the hub" in offline.stdout
    refused(run(tmp_path, "org/tiny", "", "v1", HF_HUB_OFFLINE="1"), ResourceError, "reach the hub", "HF_HUB_OFFLINE")
    (tmp_path / "checkpoints/org/tiny" / SHARDS[1]).unlink()
    refused(run(tmp_path, "org/tiny", HF_HUB_OFFLINE="1"), ResourceError, "reach the hub")


def test_large_file_resumes_at_the_byte_where_the_connection_was_cut(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": weights(6, 6_000_000)}  # parts of 10 MB are kept
    hub.cut = {"model.safetensors": 1}
    done = run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == hub.files
    ranges = [wanted for method, path, wanted, _ in hub.log if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == ["", "bytes=10485760-"]


def test_transfer_that_breaks_again_and_again_starts_anew_and_keeps_finished_files(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {SHARDS[1]: 1}
    done = run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert f"still missing: {SHARDS[1]}: attempt 2 of 5 in 2 s" in done.stderr
    assert content(tmp_path / "out") == MODEL
    assert sorted(set(hub.transfers())) == sorted(MODEL)
    assert {hub.transfers().count(name) for name in MODEL if name != SHARDS[1]} == {1}


def test_update_fetches_only_what_changed(hub: Hub, tmp_path: Path) -> None:
    run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    hub.log.clear()
    edited = tmp_path / "out/config.json"
    before = edited.stat()
    edited.write_bytes(b'{"model_type": "LLAMA"}')
    os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the content tells
    done = run(tmp_path, "org/tiny", "out", "v1", HF_ENDPOINT=hub.url)
    assert "out/config.json: not as the hub has it, will be replaced" in done.stdout
    assert hub.transfers() == ["config.json"]
    assert content(tmp_path / "out") == MODEL


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json"])
def test_file_of_the_right_size_and_wrong_content_is_refused_and_deleted(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt = {name}
    refused(run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url), ModelError, "not what the hub lists: ", name)
    assert not (tmp_path / "out" / name).exists()
    hub.corrupt.clear()
    assert run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url).returncode == 0
    assert content(tmp_path / "out") == MODEL


@pytest.mark.parametrize(
    ("source", "revision", "token", "kind", "what"),
    [
        ("org/gated", "", "", ModelError, "org/gated: the model is gated and the hub refuses you (401)"),
        ("org/gated", "", "hf_other", ModelError, "org/gated: the model is gated and the hub refuses you (403)"),
        ("org/missing", "", "", ModelError, "org/missing: the hub has no such repository, or it is private"),
        ("org/tiny", "nope", "", ModelError, "org/tiny: the repository has no revision 'nope'"),
        ("tiny", "", "", ConfigError, "source: 'tiny' is not the id of a hub repository"),
        ("org/../tiny", "", "", ConfigError, "'org/../tiny' is not the id of a hub repository\nhint: give ORG/NAME"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(
    hub: Hub, tmp_path: Path, source: str, revision: str, token: str, kind: type[UserError], what: str
) -> None:
    env = {"HF_TOKEN": token} if token else {}
    refused(run(tmp_path, source, "", revision, HF_ENDPOINT=hub.url, **env), kind, what)
    assert not (tmp_path / "checkpoints").exists()


def test_hub_out_of_reach_is_told_in_one_line_without_its_password(tmp_path: Path) -> None:
    with Hub({}) as closed:
        pass
    address = closed.url.replace("//", "//user:hf_CANARY@")
    done = run(tmp_path, "org/tiny", HF_ENDPOINT=address)
    refused(done, ResourceError, "cannot reach the hub at 127.0.0.1 (", "HF_ENDPOINT")
    assert "CANARY" not in done.stderr + done.stdout
    refused(run(tmp_path, "org/tiny", HF_HUB_OFFLINE="1"), ResourceError, "reach the hub", "HF_HUB_OFFLINE")


def test_token_is_sent_and_never_shown_or_written(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path, "org/gated", HF_ENDPOINT=hub.url, HF_TOKEN="hf_CANARY")
    bad = run(tmp_path, "org/missing", HF_ENDPOINT=hub.url, HF_TOKEN="hf_CANARY")
    assert done.returncode == 0
    assert bad.returncode == 4
    assert content(tmp_path / "checkpoints/org/gated") == MODEL
    assert {sent for _, path, _, sent in hub.log if "gated" in path} == {"Bearer hf_CANARY"}
    assert "CANARY" not in done.stdout + done.stderr + bad.stdout + bad.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > len(MODEL)
    assert not [path for path in written if b"CANARY" in path.read_bytes()]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "only pickled weights (pytorch_model.bin), which can run code",
        ),
        ({"a.gguf": b"", "b.gguf": b"", "README.md": b""}, "holds no safetensors, only GGUF files: a.gguf, b.gguf"),
        ({"config.json": b"{}", "sub/model.safetensors": b""}, "holds no safetensors at its top level"),
        (
            {"adapter_model.safetensors": b"", "adapter_config.json": b""},
            "holds no config.json, so it is not a whole model\nhint: it is an adapter: download its base model",
        ),
        (
            {"config.json": b"{}", "model.safetensors": weights(1)[:-1]},
            "model.safetensors: not a whole safetensors file",
        ),
    ],
)
def test_repository_that_is_no_whole_model_is_refused(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], what: str
) -> None:
    hub.files = files
    refused(run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url), ModelError, what)


@pytest.mark.parametrize(
    ("index", "what"),
    [
        (b'{"weight_map": {"w": 1}}', "weight_map must map each tensor to a file name"),
        (
            INDEX.replace(b"model-0", b"../model-0"),
            f"names '../{SHARDS[0]}'; only a *.safetensors file of the same folder",
        ),
        (INDEX.replace(b"model-0", b"/model-0"), f"names '/{SHARDS[0]}'; only a *.safetensors file of the same folder"),
        (INDEX.replace(b"1-of", b"3-of"), "names model-00003-of-00002.safetensors, which is missing"),
    ],
)
def test_index_that_names_no_file_of_the_repository_is_refused(
    hub: Hub, tmp_path: Path, index: bytes, what: str
) -> None:
    hub.files = MODEL | {"model.safetensors.index.json": index}
    refused(run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url), ModelError, what)


def test_configuration_that_is_no_json_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{", "model.safetensors": weights(1)}
    done = run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    assert done.returncode == 4
    assert "litpeft: error: out/config.json: config.json cannot be read: " in done.stderr


def test_folder_of_another_model_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    refused(run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url), ConfigError, "already holds another config.json")
    (tmp_path / "out/config.json").write_bytes(MODEL["config.json"])
    (tmp_path / "out/model-00003-of-00003.safetensors").write_bytes(b"mine")
    done = run(tmp_path, "org/tiny", "out", HF_ENDPOINT=hub.url)
    refused(done, ConfigError, "already holds model-00003-of-00003.safetensors, which is not a part of org/tiny")
    (tmp_path / "file").write_text("")
    refused(run(tmp_path, "org/tiny", "file", HF_ENDPOINT=hub.url), ResourceError, "file: cannot write there (")
    assert hub.transfers() == []


def test_full_disk_is_told_before_the_transfer_and_during_it(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": weights(7, 500_000)}
    with small_disk(tmp_path / "disk") as disk:
        told = "the files need 2.0 MB, the disk has 1.0 MB left"
        refused(run(tmp_path, "org/tiny", "disk/a", HF_ENDPOINT=hub.url), ResourceError, told)
        assert hub.transfers() == []
        assert list(disk.iterdir()) == []
        hub.listed_size = {"model.safetensors": 1000}  # a listing that lies
        refused(run(tmp_path, "org/tiny", "disk/a", HF_ENDPOINT=hub.url), ResourceError, "disk is full (No space left")
        assert not list(disk.rglob("*.safetensors"))
