"""Uploads to a hub on this machine: every file arrives, with a card that says what the run's record says."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import finetune, make_folder
from llama_cpp import write_bpe
from loopback_hub import Hub

from litpeft.core.errors import ConfigError, ResourceError
from litpeft.exchange.convert import convert
from litpeft.exchange.merge import merge
from litpeft.exchange.settings import Convert, Merge

COMMIT = "d" * 40


@pytest.fixture
def hub(monkeypatch):
    with Hub({}) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
        yield server


def card(hub: Hub) -> tuple[dict, str]:
    _, head, text = hub.uploaded["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_merged_folder_an_export_and_a_gguf_file_are_uploaded_with_a_card(hub, tmp_path, capsys) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    run = finetune(base, tmp_path, "--train.lr", "1e-2", "--data.system", "Say a colour.")
    capsys.readouterr()
    merge(Merge(str(run), push="org/merged"))
    assert hub.uploaded == contents(run / "merged")
    assert f"uploaded to {hub.url}/org/" in capsys.readouterr().out
    head, text = card(hub)
    assert head == {"pipeline_tag": "text-generation", "tags": ["litpeft", "lora"]}
    report = json.loads((run / "report.json").read_text())
    assert text.startswith("\n# merged\n\nA finetune of base.\n")
    assert f"| Held-out loss | {report['validation'][0][1]:.3f} before, {report['best'][1]:.3f} after" in text
    for row in ("| Base | base |", "| Method | lora |", "| Data | data |", "| System message | Say a colour. |"):
        assert row in text
    assert '"rank": 8' in text
    assert str(tmp_path) not in text
    convert(Convert(str(run), str(tmp_path / "mlx"), to="mlx", push="org/mlx"))
    assert hub.uploaded == contents(tmp_path / "mlx")
    convert(Convert(str(base), str(tmp_path / "gguf"), to="gguf", push="org/gguf"))
    assert hub.uploaded == contents(tmp_path / "gguf")
    assert "A GGUF file (f32) of base." in card(hub)[1]


def test_a_base_of_the_hub_is_named_in_the_card(hub, tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    run = finetune(base, tmp_path, "--train.lr", "1e-2", "--train.max_steps", "1")
    merge(Merge(str(run), out=str(tmp_path / "whole")))
    sums = json.loads((tmp_path / "whole" / "checksums.json").read_text()) | {"of": f"org/the.base@{COMMIT}"}
    (tmp_path / "whole" / "checksums.json").write_text(json.dumps(sums))
    again = finetune(tmp_path / "whole", tmp_path, "--train.lr", "1e-2", "--train.max_steps", "1", out="again")
    merge(Merge(str(again), push="org/merged"))
    assert card(hub)[0]["base_model"] == "org/the.base"


def test_a_refused_upload_keeps_the_folder_and_says_what_to_do(hub, tmp_path, monkeypatch) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ResourceError, match=r"refuses the upload \(401\)") as error:
        convert(Convert(str(base), str(tmp_path / "gguf"), to="gguf", push="org/gguf"))
    assert "set HF_TOKEN" in str(error.value)
    assert "hf_another" not in str(error.value)
    assert (tmp_path / "gguf" / "model.gguf").exists()
    with pytest.raises(ConfigError, match="push: 'nonsense' is not the id of a hub repository"):
        convert(Convert(str(base), str(tmp_path / "other"), to="gguf", push="nonsense"))
