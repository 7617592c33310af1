"""`train.micro_tokens: auto`: what is taken, and that a run that goes on takes the same."""

from pathlib import Path

import pytest
import yaml
from short_runs import assert_same, cut, newest, resume, train

from litpeft.train.micro_tokens import MOST, ON_A_CPU, PROBES, STEP, most_tokens

GB = 1e9


@pytest.mark.parametrize(
    ("first", "each", "free", "want"),
    [
        (1 * GB, 3e6, 60 * GB, MOST),
        (1 * GB, 3e6, 10 * GB, 3328),  # 512 + 9e9 / 3e6 = 3,512
        (1 * GB, 3e6, 0.5 * GB, STEP),  # less than the probe took
        (1 * GB, 0, 2 * GB, MOST),  # passes that are too small to tell
    ],
)
def test_as_many_tokens_as_the_memory_holds(first: float, each: float, free: float, want: int) -> None:
    tokens = most_tokens([first, first + each * (PROBES[1] - PROBES[0])], free)
    assert tokens == want
    assert tokens in (STEP, MOST) or first + each * (tokens - PROBES[0]) <= free


@pytest.mark.parametrize(
    ("recorded", "free", "want"),
    [
        (2500, 5 * GB, 512 + 256),  # QLoRA of 8B on 12 GB: 512 + (2.5e9 - 1.5e9) / 3e6 = 845
        (2500, 20 * GB, 4096),  # the longest recorded pass holds 7.5 GB, 12.5 are left for others: 4,190
        (2500, 15 * GB, 2304),  # 7.5 are left: 2,524
        (1e6, 60 * GB, MOST),
    ],
)
def test_recorded_passes_have_memory_of_their_own(recorded: float, free: float, want: int) -> None:
    first, each = 1.5 * GB, 3e6
    tokens = most_tokens([first, first + each * (PROBES[1] - PROBES[0])], free, recorded)
    assert tokens == want
    held = first + each * (min(recorded, tokens) - PROBES[0])
    assert held + first + each * (tokens - PROBES[0]) <= free


def test_auto_is_settled_once_and_kept(tiny_folder: Path, tmp_path: Path) -> None:
    auto = {"train.micro_tokens": "auto"}
    whole = train(tiny_folder, tmp_path / "whole", auto)
    again = cut(whole, 2, tmp_path / "again")
    resume(tiny_folder, again, auto)
    assert_same(again, whole)
    assert newest(again).facts["settings"]["train"]["micro_tokens"] == ON_A_CPU
    assert yaml.safe_load((whole / "run.yaml").read_text())["train"]["micro_tokens"] == ON_A_CPU


def test_a_run_of_before_that_took_2048_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    whole = train(tiny_folder, tmp_path / "whole", {"train.micro_tokens": 2048})
    again = cut(whole, 2, tmp_path / "again")
    resume(tiny_folder, again, {"train.micro_tokens": "auto"})
    assert_same(again, whole)
