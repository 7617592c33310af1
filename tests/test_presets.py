"""Well-known data sets by name: rows of each set's true shape, served by a hub on this machine, become its chats."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_rows import asked_hub, jsonl, parquet
from loopback_hub import Hub

from litpeft.cli import main
from litpeft.core.errors import ConfigError, DataError, UserError
from litpeft.data.presets import PRESETS
from litpeft.data.settings import Data
from litpeft.data.sources import find, find_measured
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer

TEXT = "Below is an instruction that describes a task. ..."
ALPACA = {"instruction": "Name the capital.", "input": "France", "output": "Paris.", "text": TEXT}
GSM = {"question": "What is 40 + 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"}
SFT = {
    "prompt": "Hi",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444d",
    "messages": [
        {"content": "Hi", "role": "user"},
        {"content": "Hello!", "role": "assistant"},
        {"content": "Sing.", "role": "user"},
        {"content": "La.", "role": "assistant"},
    ],
}
SFT_FILES = {
    f"data/{split}-00000-of-00001.parquet": parquet(SFT | {"prompt_id": split})
    for split in ("train_sft", "test_sft", "train_gen", "test_gen")
}


def message(number: str, parent: str | None, text: str, rank: int | None = None, **more: object) -> dict:
    """Returns a row of OASST1, with all of its keys."""
    return {
        "message_id": number,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": "prompter" if text[0] == "?" else "assistant",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0004, "severe_toxicity": 0.00003},
        "message_tree_id": number[0],
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    } | more


TREES = [
    message("1", None, "?Who"),
    message("1a", "1", "the second best", 1),
    message("2", None, "?Nobody answers"),
    message("1b", "1", "the best", 0),
    message("1c", "1", "not ranked"),
    message("1d", "1", "deleted", None, deleted=True),
    message("1a1", "1a", "?a follow-up of the second best"),
    message("1b1", "1b", "?Why", None),
    message("1b1a", "1b1", "because", None),
    message("1b1a1", "1b1a", "?and then nobody answers"),
    message("3", None, "?Turned down", None, review_result=False),
    message("3a", "3", "no root"),
    message("4", None, "?Last"),
    message("4a", "4", "turned down", 0, review_result=False),
    message("4b", "4", "kept", 1),
]

FILES = {
    "tatsu-lab/alpaca": {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(ALPACA)},
    "yahma/alpaca-cleaned": {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "alpaca_data_cleaned.json": json.dumps([{k: ALPACA[k] for k in ("output", "input", "instruction")}]).encode(),
    },
    "mhenrichsen/alpaca_2k_test": {"alpaca_2000.parquet": parquet(ALPACA)},
    "vicgalle/alpaca-gpt4": {"data/train-00000-of-00001-6ef3991c06080e14.parquet": parquet(ALPACA)},
    "databricks/databricks-dolly-15k": {
        "databricks-dolly-15k.jsonl": jsonl(
            {"instruction": "When?", "context": "It began in 1987.", "response": "In 1987.", "category": "closed_qa"},
            {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
        )
    },
    "GAIR/lima": {
        "lima.py": b"import datasets",
        "train.jsonl": jsonl(
            {"conversations": ["Can brains be moved?", "No."], "source": "stackexchange"},
            {"conversations": ["Hi", "Hello!", "Sing.", "La."], "source": "multi_turn"},
        ),
        "test.jsonl": jsonl({"conversations": ["Only asked"], "source": "test"}),
    },
    "akoksal/LongForm": {
        f"data/{split}-00000-of-00001-367270308d568067.parquet": parquet(
            {"input": f"Write of {split}.", "output": "Long.", "source": "Wikipedia", "subset": "wiki"}
        )
        for split in ("train", "validation", "test")
    },
    "Muennighoff/flan": {
        f"{split}/{task}_10templates_{split}.jsonl": jsonl(
            {"inputs": f"{task} {split}?", "targets": "yes", "task": f"{task}_10templates"}
        )
        for split in ("train", "validation", "test")
        for task in ("anli_r1", "samsum")
    },
    "HuggingFaceH4/deita-10k-v0-sft": SFT_FILES,
    "HuggingFaceH4/ultrachat_200k": SFT_FILES,
    "OpenAssistant/oasst1": {
        "data/train-00000-of-00001-b42a775f407cee45.parquet": parquet(*TREES),
        "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": parquet(*TREES[:2]),
        "2023-04-12_oasst_ready.trees.jsonl.gz": gzip.compress(jsonl({"message_tree_id": "1"})),
    },
    "openai/gsm8k": {
        f"{config}/{split}-00000-of-00001.parquet": parquet(GSM | {"question": f"{config} {split}"})
        for config in ("main", "socratic")
        for split in ("train", "test")
    },
}
PAIR = [[("user", "Name the capital.", "France"), ("assistant", "Paris.", "")]]
CHAT = [("user", "Hi", ""), ("assistant", "Hello!", ""), ("user", "Sing.", ""), ("assistant", "La.", "")]
MEANT = {  # name -> chats to train on, keys that have no effect
    "alpaca": (PAIR, {"text"}),
    "alpaca_cleaned": (PAIR, set()),
    "alpaca_2k": (PAIR, {"text"}),
    "alpaca_gpt4": (PAIR, {"text"}),
    "dolly": (
        [
            [("user", "When?", "It began in 1987."), ("assistant", "In 1987.", "")],
            [("user", "Why?", ""), ("assistant", "Because.", "")],
        ],
        {"category"},
    ),
    "lima": ([[("user", "Can brains be moved?", ""), ("assistant", "No.", "")], CHAT], {"source"}),
    "longform": ([[("user", "Write of train.", ""), ("assistant", "Long.", "")]], {"source", "subset"}),
    "flan": (
        [[("user", f"{task} train?", ""), ("assistant", "yes", "")] for task in ("anli_r1", "samsum")],
        {"task"},
    ),
    "deita": ([CHAT], {"prompt", "prompt_id"}),
    "ultrachat": ([CHAT], {"prompt", "prompt_id"}),
    "openassistant": (
        [
            [("user", "?Who", ""), ("assistant", "the best", ""), ("user", "?Why", ""), ("assistant", "because", "")],
            [("user", "?Last", ""), ("assistant", "kept", "")],
        ],
        {"message_id", "lang"},
    ),
    "gsm8k": ([[("user", "main train", ""), ("assistant", GSM["answer"], "")]], set()),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as patch, asked_hub(tmp_path_factory.mktemp("presets"), patch) as server:
        patch.setenv("HF_TOKEN", "hf_CANARY")
        server.sets = dict(FILES)
        yield server


@pytest.mark.parametrize("name", PRESETS)
def test_rows_of_the_sets_own_shape_become_the_chats_that_they_mean(
    hub: Hub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    data = load_dataset(Data(name, validation_split=0.0), tokenizer, ChatTemplate(tokenizer, "auto"), 10_000)
    said = [[(turn.role, turn.content, turn.input) for turn in row.turns] for row in data.train]
    assert (said, set(data.report.unread)) == MEANT[name]
    (told,) = {told.partition("; ")[2] for told in data.report.files.values()}
    assert told == f"licence: {PRESETS[name].licence}"
    commit = hub.commit(PRESETS[name].source.removeprefix("hf://").partition(":")[0])
    assert all(file.startswith(f"preset:{name}@{commit}/") for file in data.report.files)
    assert data.train[0].source.startswith("hf://")


@pytest.mark.parametrize(
    ("path", "held_out", "measured"),
    [
        ("ultrachat", ["test_sft"], ["test_sft"]),
        ("openassistant", ["validation"], ["validation"]),
        ("longform", ["validation"], ["validation"]),
        ("gsm8k", [], ["test"]),
        ("flan", ["anli_r1_10templates_validation.jsonl", "samsum_10templates_validation.jsonl"], None),
        ("preset:flan/test/samsum*", [], ["samsum_10templates_test.jsonl"]),
        ("preset:ultrachat/train_gen", [], ["train_gen"]),
        ("lima", [], ["train.jsonl"]),
    ],
)
def test_held_out_rows_of_a_set_are_not_trained_on(
    hub: Hub, path: str, held_out: list[str], measured: list[str] | None
) -> None:
    def files(sources: list) -> list[str]:
        return [source.name.rsplit("/", 1)[1].partition("-0")[0] for source in sources]

    train, kept = find(path, None)
    assert files(kept) == held_out
    assert files(find_measured(path)) == (held_out if measured is None else measured)
    assert all(source.preset is train[0].preset is not None for source in train + kept)


def test_a_name_is_never_taken_for_a_file_nor_a_file_for_a_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("dolly", None)[0] == find("preset:dolly", None)[0]
    (tmp_path / "dolly").mkdir()
    (tmp_path / "dolly" / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is a preset, and also a file or folder here") as error:
        find("dolly", None)
    assert "write ./dolly for the one here, preset:dolly for the preset" in str(error.value)
    assert find("./dolly", None)[0][0].path == Path("dolly/train.jsonl")
    assert find("preset:dolly", None)[0][0].name.startswith("hf://databricks/")
    for path, told in (
        ("preset:alpacca", "there is no preset 'alpacca' (did you mean \"alpaca\"?)"),
        ("alpaca-cleaned", 'no such file or folder\nhint: a preset, perhaps (did you mean "alpaca_cleaned"?)'),
    ):
        with pytest.raises(UserError) as error:
            find(path, None)
        assert told in str(error.value)


def test_own_columns_come_before_a_presets_and_a_bad_row_is_named(hub: Hub, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    template = ChatTemplate(tokenizer, "auto")
    own = {"user": "task", "assistant": "{targets}: {inputs}"}
    data = load_dataset(Data("flan", validation_split=0.0, columns=own), tokenizer, template, 10_000)
    assert data.train[0].turns[1].content == "yes: anli_r1 train?"
    with pytest.raises(DataError) as error:
        load_dataset(Data("preset:lima/test.jsonl", validation_split=0.0), tokenizer, template, 10_000)
    assert "hf://GAIR/lima/test.jsonl:1: nothing in it is trained" in str(error.value)


def test_the_commands_show_check_and_list_presets(hub: Hub, tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["data", "show", "lima", "--model", str(tiny_folder), "--line", "2"])
    out = capsys.readouterr().out
    assert out.startswith("hf://GAIR/lima/train.jsonl:2: ")
    assert all(text in out for text in ("Hi", "Hello!", "Sing.", "La."))
    main(["data", "check", "longform", "--model", str(tiny_folder)])
    out = capsys.readouterr().out
    assert "columns (2 rows)" in out
    assert "1 to train on, 1 held out" in out
    main(["data", "presets"])
    out = capsys.readouterr().out
    assert all(f"{name} " in out and one.licence in out for name, one in PRESETS.items())
    main(["data", "presets", "lima"])
    assert '"conversations": ["...", "..."]' in capsys.readouterr().out
