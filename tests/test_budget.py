"""How often a run measures by default: within a share of its training, and the same on each rank and when resumed."""

import json
import time

import pytest
from conftest import finetune, read_metrics
from short_runs import assert_same, cut, resume, train

from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.train.budget import ASKED, OPENING, STEP, WORD, Budget, fitting_warmup, tenth
from litpeft.train.log import duration
from litpeft.train.settings import Base, Finetune, Train, Validation

ROW = Row([5] * 100, [False] * 50 + [True] * 50, 50, "rows.jsonl:1", [])


def settings(validation: Validation | None = None, **train: int) -> Finetune:
    return Finetune(Base("base"), Data("rows"), "out", Train(**train), validation or Validation())


def measured(budget: Budget) -> list[int]:
    return [step for step in range(budget.steps + 1) if budget.due(step) or step == 0]


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 19, 40, 200, 5000])
@pytest.mark.parametrize("held_out", [1, 8, 48, 3000])
def test_what_is_measured_fits_into_its_share_but_for_one_row(steps: int, held_out: int) -> None:
    budget = Budget.of(settings(), [len(ROW.ids)] * 400, [ROW] * held_out, steps)
    times, training = measured(budget), STEP * steps * 8 * 100
    assert {0, steps} <= set(times)
    assert len(times) <= 11
    cost = len(times) * budget.rows * 100
    assert cost <= 0.1 * training or (len(times) == 2 and budget.rows == 1 and steps < 2)
    shown = [step for step in times if budget.shows(step)]
    assert (steps in shown) == (budget.sample_tokens > 0)
    cost = len(shown) * (OPENING + min(ASKED, budget.rows) * 50 + WORD * budget.sample_tokens)
    assert cost <= 0.05 * training
    assert budget.sample_tokens == 0 or budget.sample_tokens >= 16


def test_a_try_out_of_twelve_steps_measures_its_start_and_its_end() -> None:
    budget = Budget.of(settings(), [len(ROW.ids)] * 360, [ROW] * 48, 12)
    assert (measured(budget), budget.rows, budget.sample_tokens) == ([0, 12], 9, 0)
    assert budget.note(48, Validation()) == (
        "measured at start and end, on 9 of 48 held-out rows (validation.interval, validation.max_rows); "
        "no samples in so short a run (validation.sample_tokens)"
    )
    long = Budget.of(settings(), [len(ROW.ids)] * 360, [ROW] * 48, 3600)
    assert (len(measured(long)), long.rows, long.sample_tokens, long.note(48, Validation())) == (11, 48, 64, "")


def test_a_run_with_room_for_one_sample_shows_that_of_its_end_and_says_so() -> None:
    budget = Budget.of(settings(), [len(ROW.ids)] * 360, [ROW] * 48, 20)
    assert [step for step in range(21) if budget.shows(step)] == [20]
    assert "sample answers at the end of up to 43 tokens in so short a run" in budget.note(48, Validation())
    own = Budget.of(settings(Validation(sample_tokens=3)), [len(ROW.ids)] * 360, [ROW] * 48, 1)
    assert [own.shows(step) for step in (0, 1)] == [True, True]
    assert "sample" not in own.note(48, Validation(sample_tokens=3))


def test_long_rows_among_the_first_are_counted_as_what_they_cost() -> None:
    long = Row([5] * 2000, [False] * 50 + [True] * 1950, 50, "rows.jsonl:1", [])
    assert Budget.of(settings(), [100] * 360, [ROW, ROW, long, *[ROW] * 45], 12).rows == 2


@pytest.mark.parametrize(
    ("validation", "times", "rows"),
    [
        (Validation(interval=1), 13, 48),
        (Validation(interval=30), 2, 9),
        (Validation(max_rows=30), 2, 30),
        (Validation(patience=2), 7, 48),
        (Validation(final="best"), 7, 48),
        (Validation(metric="exact"), 2, 1),
    ],
)
def test_what_the_settings_say_themselves_stays(validation: Validation, times: int, rows: int) -> None:
    budget = Budget.of(settings(validation), [len(ROW.ids)] * 360, [ROW] * 48, 12)
    assert (len(measured(budget)), budget.rows) == (times, rows)


def test_samples_do_not_change_when_is_measured_and_a_length_of_ones_own_stays() -> None:
    budgets = [
        Budget.of(settings(Validation(sample_tokens=n)), [len(ROW.ids)] * 360, [ROW] * 48, 90) for n in (0, 5, 64, 900)
    ]
    assert len({(one.interval, one.rows) for one in budgets}) == 1
    assert [one.sample_tokens for one in budgets] == [0, 5, 64, 900]
    assert budgets[3].sample_interval >= 90 > budgets[1].sample_interval


def test_ten_parts_are_never_more_and_the_warmup_is_a_quarter_at_most() -> None:
    assert all(-(-steps // tenth(steps)) <= 10 for steps in range(1, 300))
    assert [fitting_warmup(10, steps) for steps in (1, 3, 12, 39, 40, 1000)] == [0, 0, 3, 9, 10, 10]
    assert fitting_warmup(0, 100) == 0


def test_a_warmup_that_does_not_fit_is_cut_and_told(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.warmup_steps", "10", "--train.epochs", "4", "--train.lr", "1e-3")
    assert "train.warmup_steps 10 are more than a quarter of the run; 2 are taken" in capsys.readouterr().out
    rates = [row["lr"] for row in read_metrics(run) if row["lr"] is not None]
    assert rates[:3] == [5e-4, 1e-3, 1e-3]
    assert len(rates) == 8


def test_a_run_with_its_own_budget_resumes_to_the_same_bits(tiny_folder, tmp_path) -> None:
    own = {"train.epochs": 6, "validation.sample_tokens": 64, "validation.interval": "null"}
    whole = train(tiny_folder, tmp_path / "whole", own)
    assert sum(row["val_loss"] is not None for row in read_metrics(whole)) < 7
    part = cut(whole, 5, tmp_path / "part")
    assert_same(resume(tiny_folder, part, own), whole)


def test_a_run_with_one_sample_asks_and_answers_at_its_end(tiny_folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("litpeft.train.budget.SAMPLED", 0.6)  # room for one sample, not for two
    own = {"train.epochs": 6, "validation.sample_tokens": 64, "validation.interval": "null"}
    run = train(tiny_folder, tmp_path / "run", own)
    assert "sample answers at the end" in capsys.readouterr().out
    samples = json.loads((run / "report.json").read_text())["samples"]
    assert [sample["before"] for sample in samples] == [None] * len(samples)


def test_the_parts_of_a_runs_time_add_up_to_all_of_it(tiny_folder, tmp_path, capsys) -> None:
    began = time.perf_counter()
    run = finetune(tiny_folder, tmp_path)
    wall = time.perf_counter() - began
    report = json.loads((run / "report.json").read_text())
    spent = report["spent"]
    assert sum(spent.values()) == pytest.approx(report["total_seconds"])
    assert set(spent) == {"loading", "reading rows", "training", "measuring", "saving", "reports", "the rest"}
    assert min(spent.values()) > 0
    assert 0.5 * wall < report["total_seconds"] < wall
    assert f"time             {duration(report['total_seconds'])}: loading" in capsys.readouterr().out
