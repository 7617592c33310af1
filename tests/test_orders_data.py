"""The quickstart's data set: made by scripts/make_orders.py, committed, and fair to measure on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "config_hub" / "data" / "orders"
SIZES = {"train": 360, "validation": 48}
WEEKDAY = re.compile("(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day")
HOURS = {"three": 3, "six": 6, "ten": 10, "eleven": 11, "twelve": 12}
TIME = re.compile(
    rf"(half past )?\b(\d+|{'|'.join(HOURS)})(am|pm| in the (?:morning|afternoon|evening)| o'clock|(?<=past twelve))"
)
AMOUNTS = {"one": 1, "a couple of": 2, "half a dozen": 6, "a dozen": 12, "two dozen": 24}
AMOUNTS |= {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10, "fifteen": 15, "twenty": 20}


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of one committed file."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_bytes().splitlines()]


def clock(sentence: str) -> str | None:
    """Returns the time that a sentence says as HH:MM, read by a pattern of this test's own."""
    said = TIME.search(sentence)
    if said is None:
        return None
    past, hour, part = said.groups()
    number = HOURS.get(hour) or int(hour)
    return f"{number + 12 * (part in ('pm', ' in the afternoon', ' in the evening')):02}:{'30' if past else '00'}"


def amount(sentence: str, item: str) -> int:
    """Returns how many of the item a sentence orders; the longest wording counts, "half a dozen" over "a dozen"."""
    ways = sorted(AMOUNTS, key=len, reverse=True)
    # The last letter is left off, so that "rye loaves" and "pastries" are found too.
    return AMOUNTS[re.search(rf"\b({'|'.join(ways)}) {item[:-1]}", sentence.replace("rye loav", "rye loaf"))[1]]


def test_making_the_data_again_gives_the_committed_bytes(tmp_path: Path):
    command = [sys.executable, str(ROOT / "scripts" / "make_orders.py"), str(tmp_path / "again")]
    subprocess.run(command, check=True)
    for name in SIZES:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_no_held_out_sentence_or_answer_occurs_in_training():
    train, held_out = rows("train"), rows("validation")
    assert len(train) == len({row["instruction"] for row in train}) == SIZES["train"]
    assert len(held_out) == len({row["instruction"] for row in held_out}) == SIZES["validation"]
    for key in ("instruction", "output"):
        assert not {row[key] for row in train} & {row[key] for row in held_out}


@pytest.mark.parametrize("name", SIZES)
def test_every_answer_is_strict_json_with_the_keys_in_their_order(name: str):
    for row in rows(name):
        answer = json.loads(row["output"])
        assert json.dumps(answer) == row["output"]
        assert list(answer) == ["name", "item", "qty", "day", "time", "gift"]
        assert [type(answer[key]) for key in ("item", "qty", "gift")] == [str, int, bool]


@pytest.mark.parametrize("name", SIZES)
def test_an_answer_says_what_the_sentence_says_and_null_where_it_says_nothing(name: str):
    names = {json.loads(row["output"])["name"] for row in rows("train")} - {None}
    for row in rows(name):
        sentence, answer = row["instruction"].removeprefix("Order to JSON: "), json.loads(row["output"])
        said = [word for word in re.findall(r"\w+", sentence) if word in names]
        assert said == ([answer["name"]] if answer["name"] else []), sentence
        days = [match[0][:3].lower() for match in WEEKDAY.finditer(sentence)]
        assert days == ([answer["day"]] if answer["day"] else []), sentence
        assert clock(sentence) == answer["time"], sentence
        assert amount(sentence, answer["item"]) == answer["qty"], sentence
        refused = re.search("no gift wrap|not gift wrapped|without gift wrap", sentence)
        assert answer["gift"] == (refused is None and re.search("gift|present", sentence) is not None), sentence


def test_every_held_out_value_was_seen_in_training_at_least_four_times():
    seen = [json.loads(row["output"]) for row in rows("train")]
    for row in rows("validation"):
        for key, value in json.loads(row["output"]).items():
            assert sum(answer[key] == value for answer in seen) >= 4, (key, value)


PAIRS = ROOT / "config_hub" / "data" / "order_pairs"


def test_the_pairs_are_the_scripts_and_their_answers_say_the_same_in_other_words(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "make_order_pairs.py", tmp_path], check=True)
    for name in SIZES:
        assert (PAIRS / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
        for line, row in zip((PAIRS / f"{name}.jsonl").open(), rows(name), strict=False):
            pair = json.loads(line)
            assert (pair["prompt"], pair["chosen"]) == (row["instruction"], row["output"])
            chosen, rejected = json.loads(pair["chosen"]), json.loads(pair["rejected"])
            assert list(chosen) == list(rejected)
            assert all(type(value) is str for value in rejected.values())
            assert (int(rejected["qty"]), rejected["gift"] == "yes") == (chosen["qty"], chosen["gift"])
            assert rejected["day"][:3].lower() == (chosen["day"] or "non")
            hour, minute = map(int, (chosen["time"] or "00:00").split(":"))
            said = re.fullmatch(r"(\d+):(\d\d) (am|pm)|none", rejected["time"])
            wanted = (int(said[1]) % 12 + 12 * (said[3] == "pm"), int(said[2])) if chosen["time"] else (0, 0)
            assert wanted == (hour, minute)
