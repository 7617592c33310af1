"""Data sets of the hub as data.path: which files an address means, and how they come here. The hub is a loopback."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import finetune
from hub_rows import asked_hub, jsonl, parquet, qa
from loopback_hub import Hub

from litpeft.cli import main
from litpeft.core.errors import DataError, ResourceError, UserError
from litpeft.data.hub.fetch import listing_of
from litpeft.data.sources import find, find_measured, pinned
from litpeft.exchange.push import figures
from litpeft.exchange.run import find_run

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: [socratic/train-*]
---
# Problems
"""
MATH = {
    "README.md": CARD.encode(),
    "main/train-00000-of-00002.parquet": parquet(*qa("1+1?", "1+2?")),
    "main/train-00001-of-00002.parquet": parquet(*qa("1+3?")),
    "main/test-00000-of-00001.parquet": parquet(*qa("9+9?")),
    "socratic/train-00000-of-00001.parquet": parquet(*qa("why?")),
    ".gitattributes": b"*",
}
PLAIN = {
    "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(*qa("a?")),
    "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": parquet(*qa("b?")),
    "2023-04-12_all.messages.jsonl.gz": gzip.compress(jsonl(*qa("c?"))),
}
TASKS = {
    "train/one_train.jsonl": jsonl(*qa("a?")),
    "train/two_train.jsonl.gz": gzip.compress(jsonl(*qa("b?"))),
    "validation/one_validation.jsonl": jsonl(*qa("c?")),
    "../evil.jsonl": jsonl(*qa("evil?")),
}
SFT = {
    "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    b"  - split: train_sft\n    path: d/train_sft-*\n  - split: test_sft\n    path: d/test_sft-*\n---\n",
    "d/train_sft-00000-of-00001.jsonl": jsonl(*qa("a?")),
    "d/test_sft-00000-of-00001.jsonl": jsonl(*qa("b?")),
}
SCRIPT = {"old.py": b"import os; os.abort()", "README.md": b"---\nlicense: mit\n---\n", "raw/rows.txt": b"x"}
SETS = {
    "org/math": MATH,
    "org/math@v1": {"train.csv": b"question,answer\nold?,yes\n"},
    "org/plain": PLAIN,
    "org/tasks": TASKS,
    "org/sft": SFT,
    "org/one": {"rows_15k.json": json.dumps(qa("only?")).encode(), "README.md": b"no card"},
    "org/old": SCRIPT,
    "org/old@refs/convert/parquet": {
        "de/train/0000.parquet": parquet(*qa("wie?")),
        "en/train/0000.parquet": parquet(*qa("how?")),
        "en/test/0000.parquet": parquet(*qa("test?")),
    },
    "org/script": {"script.py": b"", "train.jsonl": jsonl(*qa("named?"))},
    "org/chosen": {
        "README.md": b"---\nconfigs:\n- config_name: big\n  data_files: big/*.jsonl\n"
        b"- config_name: small\n  default: true\n  data_dir: small\n---\n",
        "big/x.jsonl": jsonl(*qa("big?")),
        "small/train.jsonl": jsonl(*qa("small?")),
        "small/dev.jsonl": jsonl(*qa("held?")),
    },
    "org/twice": {"train.json": b"[]", "train.csv": b""},
    "org/images": {"train/a.png": b""},
    "org/gated": {"train.jsonl": jsonl(*qa("secret?"))},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with asked_hub(tmp_path, monkeypatch) as server:
        server.sets = dict(SETS)
        yield server


def asked(sources: list) -> list[str]:
    """Returns the questions of the rows, in order."""
    return [record.value["question"] for source in sources for record in source.records("file")]


@pytest.mark.parametrize(
    ("path", "train", "held_out", "measured"),
    [
        ("hf://org/math:main", ["1+1?", "1+2?", "1+3?"], [], ["9+9?"]),
        ("hf://datasets/org/math:socratic", ["why?"], [], ["why?"]),
        ("hf://org/math:main/test", ["9+9?"], [], ["9+9?"]),
        ("hf://org/math/main", ["1+1?", "1+2?", "1+3?"], [], ["9+9?"]),
        ("hf://org/math/main/train-00001*", ["1+3?"], [], ["1+3?"]),
        ("hf://org/math@v1", ["old?"], [], ["old?"]),
        ("hf://org/plain", ["a?"], ["b?"], ["b?"]),
        ("hf://org/plain/train", ["a?"], [], ["a?"]),
        ("hf://org/plain/2023-04-12_all.messages.jsonl.gz", ["c?"], [], ["c?"]),
        ("hf://org/tasks", ["a?", "b?"], ["c?"], ["c?"]),
        ("hf://org/tasks/train/two*", ["b?"], [], ["b?"]),
        ("hf://org/tasks/**.jsonl", ["a?", "c?"], [], ["a?", "c?"]),
        ("hf://org/sft/train_sft", ["a?"], [], ["a?"]),
        ("hf://org/one", ["only?"], [], ["only?"]),
        ("hf://org/old:en", ["how?"], [], ["test?"]),
        ("hf://org/old/de/train", ["wie?"], [], ["wie?"]),
        ("hf://org/old@~parquet:de", ["wie?"], [], ["wie?"]),
        ("hf://org/script/train.jsonl", ["named?"], [], ["named?"]),
        ("hf://org/chosen", ["small?"], ["held?"], ["held?"]),
        ("hf://org/chosen:big", ["big?"], [], ["big?"]),
    ],
)
def test_an_address_means_these_rows(
    hub: Hub, path: str, train: list[str], held_out: list[str], measured: list[str]
) -> None:
    found = find(path, None)
    assert [asked(part) for part in found] == [train, held_out]
    assert asked(find_measured(path)) == measured
    assert find(tuple(map(str, found[0])), None)[0] == found[0]  # what a record calls a file can be asked for again


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("hf://org/math", "it has several configurations: main, socratic\nhint: choose one: hf://org/math:main"),
        ("hf://org/math:nope", "there is no configuration 'nope'; there are main, socratic"),
        ("hf://org/math:main/dev", "'dev' is no split, file or folder of it; splits: train, test; files: main/test-0"),
        ("hf://org/math@v9", "org/math: the repository has no revision 'v9'"),
        ("hf://org/sft", "no split called train, but train_sft, test_sft\nhint: choose one: hf://org/sft/train_sft"),
        ("hf://org/script", "rows come from a Python script, script.py, which litpeft does not run, and the hub "
         "has no Parquet copy of them\nhint: name a file of it: hf://org/script/train.jsonl"),
        ("hf://org/twice", "several kinds, perhaps the same rows twice: train.csv, train.json\nhint: name those"),
        ("hf://org/images", "it holds no file of rows, but train/a.png\nhint: a data file ends in .json"),
        ("hf://org/none", "org/none: the hub has no such repository, or it is private\nhint: check the spelling"),
        ("hf://org/gated", "org/gated: the data set is gated and the hub refuses you (401)\nhint: accept its terms"),
        ("hf://gsm8k", "'hf://gsm8k' is no data set of the hub\nhint: write hf://ORG/NAME[@REVISION]"),
        ("hf://../..", "'hf://../..' is no data set of the hub"),
        ("hf://org/a..b", "data.path: 'org/a..b' is no name of the hub: "),
        ("hf://datasets/gsm8k", "'hf://datasets/gsm8k' is no data set of the hub"),
        ("org/math", "there is no such file or folder\nhint: for the data set of the hub: hf://org/math"),
        ("https://huggingface.co/datasets/org/math/viewer", "hint: for the data set of that page: hf://org/math"),
    ],
)  # fmt: skip
def test_an_address_that_means_nothing_is_refused_with_what_there_is(hub: Hub, path: str, what: str) -> None:
    with pytest.raises(UserError) as error:
        find(path, None)
    assert what in str(error.value)


def test_files_are_fetched_once_and_used_without_a_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(find("hf://org/plain", None)[0]) == ["a?"]
    assert hub.transfers() == [name.split("/")[1] for name in PLAIN if "/" in name]  # not what is not meant
    hub.log.clear()
    listing_of.cache_clear()
    assert asked(find("hf://org/plain", None)[0]) == ["a?"]
    assert hub.transfers() == []
    find_measured("hf://org/plain")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    listing_of.cache_clear()
    capsys.readouterr()
    assert asked(find_measured("hf://org/plain")) == ["b?"]
    told = f"taking org/plain@{hub.commit('org/plain')}, which was fetched before"
    assert told in capsys.readouterr().err
    assert asked(find(f"hf://org/plain@{hub.commit('org/plain')}", None)[0]) == ["a?"]
    assert capsys.readouterr().err == ""  # a commit does not change: the hub is not asked
    with pytest.raises(ResourceError, match="cannot reach the hub"):
        find("hf://org/one", None)


def test_a_corrupt_file_is_deleted_and_a_damaged_cache_is_fetched_anew(hub: Hub) -> None:
    name = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    hub.corrupt = {f"data/{name}"}
    with pytest.raises(DataError, match="not what the hub lists: sha256"):
        find("hf://org/plain", None)
    hub.corrupt.clear()
    listing_of.cache_clear()
    (source,) = find("hf://org/plain", None)[0]
    assert hub.transfers().count(name) == 2
    damaged = source.path.read_bytes()
    source.path.resolve().write_bytes(damaged[:-1] + b"x")
    assert asked(find("hf://org/plain", None)[0]) == ["a?"]
    assert hub.transfers().count(name) == 3


def test_a_transfer_that_breaks_goes_on_where_it_was(hub: Hub) -> None:
    size = 21_000_000  # huggingface_hub keeps parts of 10 MB
    hub.sets["org/big"] = {"train.jsonl.gz": bytes(size)}
    hub.cut = {"train.jsonl.gz": 1}
    (source,) = find("hf://org/big/train.jsonl.gz", None)[0]
    assert source.path.stat().st_size == size
    ranges = [wanted for method, path, wanted, _ in hub.log if method == "GET" and path.endswith("/train.jsonl.gz")]
    assert ranges == ["", "bytes=10485760-"]


def test_the_token_of_the_environment_opens_a_gated_set(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    assert asked(find("hf://org/gated", None)[0]) == ["secret?"]


def test_a_run_records_the_commit_and_repeats_it_when_the_set_has_changed(
    hub: Hub, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.commit("org/plain")
    run = finetune(tiny_folder, tmp_path, "--data.path", "hf://org/plain", "--train.max_steps", "1")
    out = capsys.readouterr().out
    shard = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    assert f"file        hf://org/plain@{commit}/{shard}: 1 row" in out
    assert f"litpeft evaluate {run} hf://org/plain@{commit}/data/validation-" in out
    kept = yaml.safe_load((run / "run.yaml").read_text())["data"]
    assert kept["path"] == f"hf://org/plain@{commit}"
    assert figures(find_run(run))["Data"] == kept["path"]  # in the card of a model that is uploaded
    main(["evaluate", str(run), "hf://org/plain", "--max_new_tokens", "1", "--compare_base", "false"])
    assert f"hf://org/plain@{commit}/data/validation-00000-of-00001-134b8fd0c89408b6.parquet: 1 row" in (
        capsys.readouterr().err
    )
    hub.sets["org/plain"] = {"train.jsonl": jsonl(*qa("new?"))}
    listing_of.cache_clear()
    assert asked(find("hf://org/plain", None)[0]) == ["new?"]
    assert asked(find(kept["path"], None)[0]) == ["a?"]
    assert pinned({kept["path"]: 2.0, "mine.jsonl": 1.0}) == {kept["path"]: 2.0, "mine.jsonl": 1.0}
