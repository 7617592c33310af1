"""What is left after a run: a report that reads as Markdown whatever the texts hold, and a picture of the losses."""

import json
import math
import struct
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import read_metrics
from markdown_it import MarkdownIt

from litpeft.core.errors import scaled
from litpeft.core.folders import RUN_FILES
from litpeft.train.log import Log
from litpeft.train.loss_figure import loss_figure, smoothed
from litpeft.train.report import RunFacts, Sample, markdown, summary_lines, write_report

pytestmark = pytest.mark.usefixtures("drawn")

FACTS = RunFacts(
    title="lora on SmolLM2-135M-Instruct",
    command="litpeft finetune lora --base.dir smollm2 --out out/orders",
    method="lora",
    settings={"rank": 8, "targets": ("*.attn.q", "*.attn.v")},
    base="checkpoints/smollm2",
    parameters=134_515_008,
    precision="32-true",
    data="480 rows\n25 held out",
    trainable=1_221_120,
    delta_bytes=4_900_212,
    steps=60,
    epochs=2.0,
    tokens=30_720,
    trained_tokens=12_000,
    seconds=112.3,
    total_seconds=171.0,
    tokens_per_second=273.6,
    device="cpu",
    threads=2,
    versions={"litpeft": "0.1.0", "torch": "2.13.0"},
    stopped="all steps done",
    peak_memory=1_930_000_000,
    first_loss=2.4127,
    last_loss=0.5013,
    validation=[(0, 2.5), (30, 0.7), (60, 0.75)],
    best=(30, 0.7),
    samples=[Sample("Two pizzas, please", '{"item": "pizza"}', "Sure!", '{"item": "pizza"}')],
    next_commands=["litpeft chat out/orders", "litpeft merge out/orders"],
)
HOSTILE = "a ```` b\n```\n# no heading\n</p> | x | <script>alert(1)</script> $x$ [l](u)\x1b[31m\ud800\n~~~~\n\n---\t|"


def log_run(folder, steps: int) -> list[tuple[float, float, float]]:
    """Returns step, loss and learning rate of each step of a run that was logged."""
    losses = [0.5 + 2 * math.exp(-step / 20) for step in range(1, steps + 1)]
    with Log(folder, steps) as log:
        for step, loss in enumerate(losses, start=1):
            log.step(step=step, loss=loss, lr=2e-4 / step, tokens_per_second=50.0, seconds=float(step))
        log.validation(steps, 0.75, 100)
    return log.curve


def outline(text: str) -> list[tuple[str, str]]:
    """Returns the headings and fences that a CommonMark parser sees, with their texts."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    seen = [("heading", tokens[i + 1].content) for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert not [token for token in tokens if token.type in ("html_block", "hr")]
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) <= {"text", "code_inline", "image", "softbreak", "text_special"}
    return seen + [("fence", token.content.rstrip("\n")) for token in tokens if token.type == "fence"]


def test_the_report_and_the_picture_are_written(tmp_path):
    path = write_report(tmp_path, FACTS, log_run(tmp_path, 60))
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.md"
    assert "](loss.png)" in text
    for figure in (
        "2.413 → 0.501 nats per token",
        "2.500 → 0.750 nats per token, best 0.700 at step 30",
        "1.2 M of 134.5 M parameters (0.908 %)",
        "4.9 MB",
        "60 steps (2 epochs) in 1 min 52 s; 2 min 51 s with start, validation and saving",
        "30,720 read, 12,000 of them trained on",
        "274 tokens/s, peak memory 1.9 GB, cpu (2 threads)",
    ):
        assert figure in text
    png = (tmp_path / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1600, 1080)


def test_the_picture_shows_the_figures_of_metrics_csv(tmp_path):
    curve = log_run(tmp_path, 60)
    rows = [row for row in read_metrics(tmp_path) if row["loss"] is not None]
    losses = [row["loss"] for row in rows]
    upper, lower = loss_figure(curve, FACTS.title, FACTS.validation, FACTS.best_point).axes
    raw, smooth, held_out, best = upper.lines
    assert list(raw.get_ydata()) == losses
    assert list(smooth.get_ydata()) == smoothed(losses)
    assert list(zip(*held_out.get_data(), strict=True)) == FACTS.validation
    assert tuple(np.ravel(best.get_data())) == (30, 0.7)
    assert list(lower.lines[0].get_ydata()) == [row["lr"] for row in rows]
    assert upper.get_ylabel() == "loss (nats per token)"
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("optimizer steps", "learning rate")


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 500])
@pytest.mark.filterwarnings("error")
def test_any_number_of_steps_can_be_drawn(tmp_path, steps):
    write_report(tmp_path, replace(FACTS, title="prefix on 模型 $x_1^$", validation=[]), log_run(tmp_path, steps))
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_run_without_a_step_has_no_picture(tmp_path):
    with Log(tmp_path, 10) as log:
        log.validation(0, 2.0, 10)
    facts = replace(FACTS, steps=0, first_loss=None, last_loss=None, validation=[(0, 2.0)], stopped="Ctrl-C at step 0")
    assert "loss.png" not in write_report(tmp_path, facts, log.curve).read_text()
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_is_the_gaussian_mean_over_the_steps_there_are():
    values = list(np.random.default_rng(0).normal(size=240))
    distance = np.arange(240)[:, None] - np.arange(240)
    weights = np.where(abs(distance) <= 12, np.exp(-0.5 * (distance / 4) ** 2), 0)
    np.testing.assert_allclose(smoothed(values), weights @ values / weights.sum(1), rtol=1e-12)
    np.testing.assert_allclose(smoothed([0.3] * 20), [0.3] * 20, rtol=1e-12)


def test_hostile_text_does_not_break_the_markdown():
    plain = outline(markdown(FACTS, "loss.png"))
    bad = Sample(*[HOSTILE] * 4)
    facts = replace(
        FACTS, data=HOSTILE, command=HOSTILE, base=HOSTILE, precision=HOSTILE, settings={"k": HOSTILE}, samples=[bad]
    )
    facts = replace(facts, versions={"x": HOSTILE}, next_commands=[HOSTILE], stopped=HOSTILE, device=HOSTILE)
    text = markdown(facts, "loss.png")
    seen = outline(text)
    assert [kind for kind, _ in seen] == [kind for kind, _ in plain]
    assert [words for kind, words in seen if kind == "heading"] == [words for kind, words in plain if kind == "heading"]
    clean = HOSTILE.replace("\x1b", "\ufffd").replace("\ud800", "\ufffd").replace("---\t|", "--- |")
    assert [words for kind, words in seen if kind == "fence"].count(clean) == 4  # prompt, data, next, command
    assert "\x1b" not in text
    text.encode("utf-8")


def test_the_three_answers_stand_side_by_side_and_whole():
    long = " ".join(f"word{i}" for i in range(40))
    sample = Sample("q", long, "short\n\n大きい", "x" * 90)
    table = next(words for kind, words in outline(markdown(replace(FACTS, samples=[sample]), None)) if "┌" in words)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[0] == "│"]
    assert cells[0] == ["expected", "before", "after"]
    expected, before, after = zip(*cells[1:], strict=True)
    assert " ".join(expected).strip() == long
    assert before[:3] == ("short", "", "大きい")
    assert "".join(after) == "x" * 90


def test_a_run_too_short_for_a_sample_at_its_start_shows_that_of_its_end():
    text = markdown(replace(FACTS, samples=[Sample("q", "yes", None, "no")]), None)
    table = next(words for kind, words in outline(text) if "┌" in words)
    assert [cell.strip() for cell in table.splitlines()[1].strip("│").split("│")] == ["expected", "after"]
    assert "answered with what was learned" in text


def test_the_best_measurement_is_the_one_that_patience_waits_from():
    def told(**changes) -> str:
        return next(line for line in summary_lines(replace(FACTS, **changes)) if line.startswith("validation"))

    assert told().endswith("2.500 → 0.750 nats per token, best 0.700 at step 30")
    worse = told(validation=[(0, 0.5), (30, 0.7), (60, 0.75)])
    assert worse.endswith("0.500 → 0.750 nats per token, best 0.700 at step 30, no better than the start's 0.500")
    exact = told(metric="exact", best=(60, 0.25))
    assert exact.endswith("2.500 → 0.750 nats per token; most exact answers 25.0% at step 60")


def test_a_long_text_says_how_much_is_left_out():
    text = markdown(replace(FACTS, samples=[Sample("p" * 2500, "a", "b", "c")]), None)
    assert "p" * 2000 + " … (500 more characters)" in text


@pytest.mark.parametrize("commands", [0, 3, 9])
@pytest.mark.parametrize("validation", [[], [(0, 2.5)], [(0, 2.5), (60, math.nan)]])
def test_the_summary_has_four_to_eight_lines(commands, validation):
    facts = replace(FACTS, next_commands=["litpeft chat\n out"] * commands, validation=validation)
    lines = summary_lines(facts)
    assert 4 <= len(lines) <= 8
    assert not any("\n" in line for line in lines)
    assert lines[0].startswith(
        "lora on SmolLM2-135M-Instruct: all steps done, 60 steps (2 epochs) in 1 min 52 s; 2 min"
    )
    assert lines[1].endswith("2.413 → 0.501 nats per token (first and last 5 % of the steps)")


def test_what_is_said_of_a_stopped_run_begins_with_how_it_goes_on():
    command = "litpeft finetune lora --config out/run.yaml --out out --resume"
    facts = replace(FACTS, go_on=command, next_commands=["x"] * 9)
    lines = summary_lines(facts)
    assert lines[0] == f"to go on         {command}"
    assert lines[1].startswith("lora on SmolLM2-135M-Instruct: all steps done")
    assert len(lines) <= 8
    assert next(words for kind, words in outline(markdown(facts, None)) if kind == "fence") == command


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0, "", "0"), (912, "B", "912 B"), (1000, "B", "1.0 kB"), (9216, "", "9.2 k"), (4_900_212, "B", "4.9 MB")]
    + [(999_960, "", "1.0 M"), (134_515_008, "", "134.5 M"), (7.2e9, "", "7.2 G"), (3e15, "B", "3,000.0 TB")],
)
def test_counts_are_scaled_with_decimal_prefixes(number, unit, text):
    assert scaled(number, unit) == text


def test_the_facts_are_written_as_json_too_and_replaced_with_the_run(tmp_path):
    facts = replace(FACTS, command=HOSTILE)
    write_report(tmp_path, facts, log_run(tmp_path, 3))
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record.keys() == {field.name for field in fields(RunFacts)}
    assert (record["command"], record["trainable"], record["seconds"]) == (HOSTILE, 1_221_120, 112.3)
    assert record["validation"] == [[0, 2.5], [30, 0.7], [60, 0.75]]
    assert record["samples"][0]["after"] == '{"item": "pizza"}'
    assert "report.json" in RUN_FILES


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells it apart")
def test_the_peak_memory_is_that_of_the_run_and_not_of_the_program_that_started_it() -> None:
    child = "from litpeft.train.records import peak_memory; print(peak_memory())"
    parent = (
        f"import subprocess, sys; held = bytearray(2_000_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    said = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert 50e6 < int(said.stdout) < 1.8e9, said
