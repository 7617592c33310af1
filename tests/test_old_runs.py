"""Runs that older versions of litpeft made are read and continued: tests/old_runs/make.py says how they were made."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from old_runs.make import IDS, METHODS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.generate.load import load_model

FOLDER = Path(__file__).parent / "old_runs"


@pytest.fixture(scope="module", params=["format2", "format3"])
def archive(request, tmp_path_factory) -> Path:
    """What an archive holds. Tests must not change it."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(FOLDER / f"{request.param}.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(params=METHODS)
def run(request, archive: Path) -> Path:
    return archive / request.param


def base_of(run: Path, archive: Path) -> str | None:
    """Returns the base that a run's delta is put beside; `full` leaves a model by itself."""
    return None if run.name == "full" else str(archive / "base")


def assert_gives_its_logits(run: Path, archive: Path, limit: float = 1e-5) -> None:
    want = load_file(archive / run.name / "logits.safetensors")["logits"]
    with torch.no_grad():
        got = load_model(str(run), base=base_of(run, archive), precision="32-true").model(IDS)
    assert (got - want).abs().max() <= limit * want.abs().max()


def test_an_old_run_says_in_its_record_which_format_it_has(run: Path, archive: Path) -> None:
    assert f"format{json.loads((run / 'final' / 'delta.json').read_text())['format']}" in archive.name


def test_an_old_run_gives_the_logits_and_answers_that_it_gave_then(run: Path, archive: Path, tmp_path) -> None:
    assert_gives_its_logits(run, archive)
    files = ["--input", archive / "data" / "validation.jsonl", "--output", tmp_path / "answers.jsonl"]
    base = ["--base", archive / "base"] if base_of(run, archive) else []
    more = ["--precision", "32-true", "--sampling.max_new_tokens", 8]
    main(["generate", *map(str, (run, *files, *base, *more))])
    assert (tmp_path / "answers.jsonl").read_text() == (run / "answers.jsonl").read_text()


def test_an_old_run_is_evaluated_beside_its_base(run: Path, archive: Path, capsys) -> None:
    more = ["--base", archive / "base", "--precision", "32-true", "--max_new_tokens", 8]
    main(["evaluate", *map(str, (run, archive / "data" / "validation.jsonl", *more))])
    said = capsys.readouterr().out
    losses = [float(n) for n in re.search(r"loss, nats per token +([\d. ]+)", said)[1].split()]
    measured = [row["val_loss"] for row in read_metrics(run) if row["val_loss"] is not None]
    assert losses == pytest.approx([measured[0], measured[-1]], abs=1e-4)
    assert "2/2 (100.0%)" in said


def test_an_old_lora_is_merged_into_a_model_that_transformers_loads(archive: Path, tmp_path) -> None:
    words = ["--base", archive / "base", "--out", tmp_path / "merged", "--dtype", "float32"]
    main(["merge", *map(str, (archive / "lora", *words))])
    want = load_file(archive / "lora" / "logits.safetensors")["logits"]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert (theirs - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_old_checkpoint_goes_on_to_the_same_end_and_beyond(run: Path, archive: Path, tmp_path, capsys) -> None:
    again = shutil.copytree(run, tmp_path / run.name)
    shutil.rmtree(again / "final")
    (again / "report.md").unlink()
    places = ["--base.dir", archive / "base", "--data.path", archive / "data", "--out", again]
    words = ["finetune", run.name, "--config", again / "run.yaml", *places, "--resume"]
    main(list(map(str, words)))
    assert "going on after step 398 of 400" in capsys.readouterr().out
    assert_gives_its_logits(again, archive, 1e-4)
    main([*map(str, words), "--train.max_steps", "402", "--resume_changed", '["train.max_steps"]'])
    assert json.loads((again / "final" / "delta.json").read_text())["step"] == 402
