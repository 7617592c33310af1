"""`litpeft download` of data sets: listed with sizes, fetched into the cache that data.path uses, or into a folder."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_rows import asked_hub, jsonl, parquet, qa
from loopback_hub import Hub

from litpeft.core.errors import ConfigError, UserError, scaled
from litpeft.data.hub.fetch import listing_of
from litpeft.data.sources import find
from litpeft.exchange.download import download
from litpeft.exchange.settings import Download

FILES = {
    "README.md": b"# A set",
    "data/train-00000-of-00001.parquet": parquet(*qa("a?")),
    "data/validation-00000-of-00001.parquet": parquet(*qa("b?")),
    "data/test-00000-of-00001.parquet": parquet(*qa("c?")),
    "other.bin": b"x",
}
ROWS = [name for name in FILES if name.startswith("data/")]
LIMA = {"lima.py": b"", "train.jsonl": jsonl({"conversations": ["Hi", "Hello"], "source": "x"}), "test.jsonl": b"{}\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with asked_hub(tmp_path, monkeypatch) as server:
        server.sets = {"org/set": FILES, "org/set@v1": {"train.csv": b"question,answer\nold?,yes\n"}, "GAIR/lima": LIMA}
        yield server


def test_a_dry_run_lists_the_files_of_rows_with_sizes_and_fetches_none(hub: Hub, capsys: pytest.CaptureFixture) -> None:
    download(Download("datasets/org/set", dry_run=True))
    *files, total = capsys.readouterr().out.splitlines()
    assert {line.split()[-1] for line in files} == set(ROWS)
    assert {" ".join(line.split()[:2]) for line in files} == {scaled(len(FILES[name]), "B") for name in ROWS}
    assert f"would download 3 files, {scaled(sum(len(FILES[name]) for name in ROWS), 'B')}, of org/set@" in total
    assert [name for name in hub.transfers() if name != "README.md"] == []
    download(Download("datasets/org/set/data/test*", dry_run=True))
    assert "would download 1 file" in capsys.readouterr().out


def test_what_was_downloaded_is_trained_on_without_a_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    download(Download("datasets/org/set"))
    out = capsys.readouterr().out
    assert "3 files of org/set@" in out
    assert out.endswith("next: litpeft data show hf://org/set --model MODEL\n")
    download(Download("datasets/lima"))
    assert capsys.readouterr().out.endswith("next: litpeft data show preset:lima --model MODEL\n")
    download(Download("hf://datasets/org/set@v1"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    listing_of.cache_clear()
    train, held_out = find(("hf://org/set", "lima", "hf://org/set@v1"), None)
    said = [next(iter(record.value.values())) for source in train + held_out for record in source.records("file")]
    assert said == ["a?", "x", "old?", "b?"]


def test_a_folder_gets_the_files_and_another_sets_files_are_left_alone(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    download(Download("datasets/org/set", out="rows", revision="main"))
    assert {name: (tmp_path / "rows" / name).read_bytes() for name in ROWS} == {name: FILES[name] for name in ROWS}
    shard = "rows/data/train-00000-of-00001.parquet"
    assert capsys.readouterr().out.endswith(f"next: litpeft data show {shard} --model MODEL\n")
    hub.log.clear()
    download(Download("datasets/org/set", out="rows"))
    assert hub.transfers() == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds another train\.csv than org/set"):
        download(Download("datasets/org/set@v1", out="mine"))


@pytest.mark.parametrize(
    ("source", "revision", "what"),
    [
        ("datasets/org/none", None, "org/none: the hub has no such repository, or it is private"),
        ("datasets/alpacca", None, "'hf://datasets/alpacca' is no data set of the hub"),
        ("datasets/org/set@v1", "main", "revision: 'main', and the source says 'v1'"),
        ("datasets/org/set", "v9", "the repository has no revision 'v9'"),
    ],
)
def test_what_cannot_be_meant_is_refused(hub: Hub, source: str, revision: str | None, what: str) -> None:
    with pytest.raises(UserError) as error:
        download(Download(source, revision=revision))
    assert what in str(error.value)
