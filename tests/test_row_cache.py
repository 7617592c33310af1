"""Tokenised rows on disk: the same as tokenised anew, never stale, and rebuilt where they are damaged."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from chat_samples import write_folder

from litpeft.core.errors import DataError
from litpeft.data import cache
from litpeft.data.report import Weights
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty cache that keeps small sets too, a folder with a tokenizer, and a file of rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST", 4)
    write_folder(tmp_path / "model", "chatml")
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i))), "id": i} for i in range(1, 13)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def load(place: Path, now: datetime | None = None, **settings) -> DataSet:
    template = ChatTemplate(Tokenizer.load(place / "model"), settings.get("template", "auto"), now)
    values = {"validation_split": 0.25, "path": str(place / "rows.jsonl")} | settings
    return load_dataset(Data(**values), template.tokenizer, template, 512)


def content(data: DataSet) -> list:
    report = {key: value for key, value in vars(data.report).items() if key != "cache"}
    fields = ("ids", "trained", "prompt_length", "source", "turns", "ended", "weights")
    return [[[getattr(row, f) for f in fields] for row in part] for part in (data.train, data.validation)] + [report]


def files() -> list[Path]:
    return sorted(cache.folder().glob("*")) if cache.folder().exists() else []


def test_rows_from_the_cache_are_those_tokenised(place, tmp_path) -> None:
    bad = [{"output": "no question"}, {"instruction": "long", "output": "word " * 300}]
    weighted = [{"instruction": "Count.", "output": f"{i}", "weight": i / 3} for i in range(1, 4)]
    with open(place / "rows.jsonl", "a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in bad + weighted)
    settings = {"bad_rows": "skip", "max_length": 150, "path": {str(place / "rows.jsonl"): 1.5}}
    for overlong in ("drop", "split"):
        fresh, again = (load(place, overlong=overlong, **settings) for _ in range(2))
        assert (fresh.report.cache, again.report.cache) == (
            "",
            str(next(f for f in files() if f.stem in again.report.cache)),
        )
        assert content(fresh) == content(again)
        assert again.rejected
        assert again.report.weights == Weights(2, 1 / 3, 2 / 3)
    assert f"tokens      read from {again.report.cache} (data.cache)" in str(again.report)


def changed_file(place: Path, name: str, old: str, new: str) -> None:
    path = place / name
    text = path.read_text()
    assert old in text
    before = path.stat()
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time says nothing


CHANGES = {
    "a byte of the rows": lambda place, _: changed_file(place, "rows.jsonl", "Count to 7", "Count to 8"),
    "the tokenizer": lambda place, _: changed_file(
        place, "model/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Lowercase"}'
    ),
    "the template": lambda place, _: changed_file(place, "model/chat_template.jinja", "im_start|>", "im_start|> "),
    "the code": lambda _, monkeypatch: monkeypatch.setattr(cache, "code", lambda: "another"),
    "format": {"format": "alpaca"},
    "columns": {"columns": {"user": "instruction", "assistant": "output"}},
    "the name of the template": {"template": "alpaca"},
    "system": {"system": "Be brief."},
    "mask_prompt": {"mask_prompt": False},
    "max_length": {"max_length": 300},
    "overlong": {"overlong": "drop"},
    "bad_rows": {"bad_rows": "skip"},
    "documents": {"documents": "line"},
    "off": {"cache": False},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_rows_depend_on_is_never_taken_from_a_cache_of_something_else(what, place, monkeypatch) -> None:
    load(place)
    assert load(place).report.cache
    change, settings = CHANGES[what], {}
    if callable(change):
        change(place, monkeypatch)
    else:
        settings = change
    changed = load(place, **settings)
    assert not changed.report.cache
    assert content(changed) == content(load(place, **settings | {"cache": False}))


def test_the_split_the_order_and_packing_are_of_rows_that_the_cache_has(place) -> None:
    load(place)
    for settings in ({"seed": 5}, {"validation_split": 0.5}, {"packing": False}):
        cached, fresh = load(place, **settings), load(place, cache=False, **settings)
        assert cached.report.cache
        assert content(cached) == content(fresh)


def test_a_template_that_prints_the_date_gives_rows_of_its_date(place) -> None:
    (place / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ strftime_now('%d') }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    first, same, other = (load(place, datetime(2026, 11, day)) for day in (3, 3, 4))
    assert [bool(data.report.cache) for data in (first, same, other)] == [False, True, False]
    assert first.train[0].ids != other.train[0].ids


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "foreign"])
def test_a_damaged_file_is_told_and_built_again(damage, place, capsys) -> None:
    whole = content(load(place))
    (file,) = files()
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes({"bit": data, "short": data[:-9], "empty": b"", "foreign": b"x" * 500}[damage])
    again = load(place)
    assert (again.report.cache, content(again)) == ("", whole)
    assert f"{file} is damaged" in capsys.readouterr().err
    assert load(place).report.cache == str(file)


def test_what_a_killed_process_left_is_ignored_and_removed_after_a_day(place) -> None:
    cache.folder().mkdir(parents=True)
    old, new = (cache.folder() / f".tmp-{name}" for name in (1, 2))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * cache.ABANDONED,) * 2)
    assert not load(place).report.cache
    assert not old.exists()
    assert new.exists()


def test_the_files_that_were_not_used_for_longest_make_room(place, monkeypatch) -> None:
    load(place, system="a")
    load(place, system="b")
    by_time = sorted(files(), key=lambda file: file.stat().st_mtime_ns)
    load(place, system="a")  # it is now the newer one
    monkeypatch.setattr(cache, "MOST", int(2.5 * by_time[0].stat().st_size))
    load(place, system="c")
    assert by_time[0] in files()
    assert by_time[1] not in files()
    assert len(files()) == 2


def test_where_nothing_can_be_written_the_run_goes_on(place, monkeypatch, capsys) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    assert len(load(place).train) == 9
    assert "the rows cannot be kept in" in capsys.readouterr().err


def test_neither_a_small_set_nor_an_error_is_kept(place, monkeypatch) -> None:
    monkeypatch.setattr(cache, "LEAST", 13)
    load(place)
    monkeypatch.setattr(cache, "LEAST", 1)
    with pytest.raises(DataError, match="longer than 5 tokens"):
        load(place, max_length=5)
    assert files() == []


def test_runs_at_the_same_time_get_the_same_rows(place) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: content(load(place)), range(8)))
    assert all(one == found[0] for one in found)
    assert [file.suffix for file in files()] == [".rows"]
