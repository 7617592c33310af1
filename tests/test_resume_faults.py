"""Signals, kills, full disks and numbers that are not finite: what is saved by then, and that it goes on from there."""

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import read_metrics
from safetensors.torch import load_file
from short_runs import (
    LONG,
    QUIET,
    Settings,
    assert_same,
    cut,
    delta,
    figures,
    kills,
    leftovers,
    newest,
    poisoned,
    resume,
    start,
    train,
    wait_for_step,
    words,
)
from torch import Tensor

import litpeft.train.step
from litpeft.train.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def long_run(tiny_folder, tmp_path_factory) -> Path:
    """A run of forty steps with LONG, which was not interrupted."""
    return train(tiny_folder, tmp_path_factory.mktemp("long") / "run", LONG)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_saves_the_step_and_the_run_goes_on(number, code: int, long_run, tiny_folder, tmp_path) -> None:
    run = tmp_path / "run"
    rare = LONG | {"checkpoint.interval": 0, "checkpoint.keep_best": False}
    process = start(words(tiny_folder, run, rare), tmp_path / "said")
    wait_for_step(run, 7, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code, (tmp_path / "said").read_text()
    step = newest(run).step
    assert 7 <= step < 40
    facts = json.loads((run / "final/delta.json").read_text())
    assert (facts["step"], facts["finished"]) == (step, False)
    assert f"{number.name} at step {step} of 40" in (run / "report.md").read_text()
    assert_same(resume(tiny_folder, run, LONG), long_run)


def program(argv: list[str], **streams) -> subprocess.Popen:
    """Returns the command as a program of its own."""
    return subprocess.Popen([sys.executable, "-m", "litpeft", *argv], start_new_session=True, **streams)


class Alive:
    """Such a program, as `wait_for_step` looks at it."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def exitcode(self) -> int | None:
        return self.process.returncode


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminal_that_closes_ends_the_run_with_its_step_saved(devices: int, long_run, tiny_folder, tmp_path) -> None:
    run = tmp_path / "run"
    master, slave = pty.openpty()
    argv = words(tiny_folder, run, LONG | {"checkpoint.interval": 0, "checkpoint.keep_best": False, "devices": devices})
    take_it = partial(fcntl.ioctl, slave, termios.TIOCSCTTY, 0)  # as the shell of an ssh session has it
    process = program(argv, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_it)
    os.close(slave)
    wait_for_step(run, 3, Alive(process))
    os.close(master)  # the kernel sends SIGHUP, and refuses all that is written from now on
    assert process.wait() == 75
    step = newest(run).step
    assert 3 <= step < 40
    assert json.loads((run / "final/delta.json").read_text())["step"] == step
    assert f"SIGHUP at step {step} of 40" in (run / "report.md").read_text()
    if devices == 1:
        assert_same(resume(tiny_folder, run, LONG), long_run)


@pytest.mark.slow
def test_a_run_whose_readers_leave_goes_on_to_its_end(long_run, tiny_folder, tmp_path) -> None:
    run = tmp_path / "run"
    process = program(words(tiny_folder, run, LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    wait_for_step(run, 3, Alive(process))
    process.stderr.close()
    assert process.wait() == 0
    assert_same(run, long_run)


def test_a_run_under_nohup_does_not_hear_the_terminal_close(tiny_folder, tmp_path, monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        poisoned(monkeypatch, 5, lambda loss: (os.kill(os.getpid(), signal.SIGHUP), loss)[1])
        run = train(tiny_folder, tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads((run / "final/delta.json").read_text())["finished"] is True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_before_the_first_step_has_nothing_to_save(number, code: int, tiny_folder, tmp_path) -> None:
    said = tmp_path / "said"
    process = start(words(tiny_folder, tmp_path / "run", LONG), said)
    while process.is_alive() and "template" not in (said.read_text() if said.exists() else ""):
        time.sleep(0.001)  # the rows are read, the model is not built
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    assert f"{number.name}: no step was taken, there is nothing to save" in said.read_text()
    assert not list(tmp_path.rglob("step-*"))


def interrupt_twice(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return loss


def test_a_second_interrupt_ends_the_run_at_once_and_keeps_its_checkpoints(tiny_folder, tmp_path, monkeypatch) -> None:
    whole, run = train(tiny_folder, tmp_path / "whole"), tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, 8, interrupt_twice)  # in step 3
        with pytest.raises(SystemExit) as stop:
            train(tiny_folder, run)
    assert stop.value.code == 130
    assert newest(run).step == 2
    assert not (run / "final").exists()
    assert_same(resume(tiny_folder, run), whole)


def interrupt(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return loss


def test_what_a_signal_left_unmeasured_is_measured_when_the_run_goes_on(tiny_folder, tmp_path, monkeypatch) -> None:
    whole, run = train(tiny_folder, tmp_path / "whole"), tmp_path / "run"  # each step is measured
    with monkeypatch.context() as patch:
        poisoned(patch, 5, interrupt)  # in step 2
        with pytest.raises(SystemExit) as stop:
            train(tiny_folder, run)
    assert stop.value.code == 130
    assert newest(run).step == 2
    assert newest(run).state["progress"]["validations"][-1][0] == 1
    assert_same(resume(tiny_folder, run), whole)


def test_a_run_that_was_out_of_time_goes_on(tiny_folder, tmp_path) -> None:
    whole = train(tiny_folder, tmp_path / "whole")
    run = train(tiny_folder, tmp_path / "run", {"train.max_time": 1e-6})
    assert json.loads((run / "final/delta.json").read_text())["finished"] is False
    assert_same(resume(tiny_folder, run), whole)


def spoil_metrics(run: Path) -> None:
    with open(run / "metrics.csv", "r+") as file:
        file.truncate(0)
        file.write("city,people\n")


@pytest.mark.parametrize(
    ("action", "whole_metrics"),
    [
        (lambda run: (run / "metrics.csv").unlink(), True),
        (lambda run: (run / "run.yaml").replace(run / "metrics.csv"), True),
        (lambda run: run.rename(run.parent / "elsewhere"), True),
        (shutil.rmtree, True),
        (spoil_metrics, False),
    ],
    ids=["metrics removed", "metrics replaced", "folder renamed", "folder removed", "metrics overwritten"],
)
@pytest.mark.usefixtures("drawn")
def test_what_is_removed_while_a_run_goes_on_is_there_at_its_end(
    action, whole_metrics: bool, tiny_folder, tmp_path, monkeypatch
) -> None:
    whole, run = train(tiny_folder, tmp_path / "whole"), tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, 8, lambda loss: (action(run), loss)[1])  # in step 3
        train(tiny_folder, run)
    if whole_metrics:
        assert_same(run, whole)
    assert delta(run).keys() == delta(whole).keys()
    assert all(torch.equal(tensor, delta(whole)[name]) for name, tensor in delta(run).items())
    assert (run / "loss.png").read_bytes() == (whole / "loss.png").read_bytes()
    assert yaml.safe_load((run / "run.yaml").read_text())["train"]["batch_size"] == 4
    assert json.loads((run / "report.json").read_text())["stopped"] == "all steps done"


def test_a_best_checkpoint_that_is_removed_leaves_the_last_weights_and_an_error(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    ends = QUIET | {"validation.final": "best", "validation.interval": 1, "data.validation_path": against(tmp_path)}
    ends |= {"train.epochs": 40, "train.schedule": "constant", "checkpoint.interval": 80}
    run = tmp_path / "run"
    poisoned(monkeypatch, 6 * 40, lambda loss: (shutil.rmtree(run / "checkpoints"), loss)[1])
    with pytest.raises(SystemExit) as stop:
        train(tiny_folder, run, ends)
    assert stop.value.code == 4
    best = json.loads((run / "report.json").read_text())["best"][0]
    said = capsys.readouterr().err
    assert f"there is no checkpoint of step {best}" in said
    assert f"final/ holds the weights of step 80, not the best of step {best}" in said
    assert json.loads((run / "final/delta.json").read_text())["step"] == 80
    assert all(torch.equal(tensor, newest(run).tensors("delta")[name]) for name, tensor in delta(run).items())


def test_the_report_tells_the_time_in_steps_and_in_all_of_every_command(tiny_folder, tmp_path) -> None:
    def seconds() -> tuple[float, float]:
        facts = json.loads((run / "report.json").read_text())
        return facts["seconds"], facts["total_seconds"]

    began = time.perf_counter()
    run = train(tiny_folder, tmp_path / "run", {"train.max_time": 1e-6})
    first, between = seconds(), time.perf_counter()
    assert first[0] < first[1] < between - began
    resume(tiny_folder, run)
    second = seconds()
    assert first[1] + second[0] - first[0] < second[1] < time.perf_counter() - began


def in_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda loss: loss * torch.nan, "the loss of row "), (in_gradient, "the gradient of blocks.0")],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_ends_the_run_before_its_step(
    spoil, said, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    whole = train(tiny_folder, tmp_path / "whole")
    run = shutil.copytree(whole, tmp_path / "run")
    with monkeypatch.context() as patch:
        poisoned(patch, 4 + 2 + 3, spoil)  # the third micro-batch of step 3
        with pytest.raises(SystemExit) as stop:
            train(tiny_folder, run, {"overwrite": True})
    error = capsys.readouterr().err
    assert stop.value.code == 5
    assert f"step 3: {said}" in error
    assert error.count("train.jsonl:") == ("row" in said)  # of four rows in that step
    assert newest(run).step == 2
    assert not (run / "final").exists()
    assert not leftovers(run)
    assert_same(resume(tiny_folder, run), whole)


def test_what_trains_is_named_where_it_is_not_finite_and_no_row_is_blamed(tiny_folder, tmp_path, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def spoil(self, *args) -> None:
        step(self, *args)
        self.param_groups[0]["params"][0].data[0, 0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(SystemExit) as stop:
        train(tiny_folder, tmp_path / "run", QUIET | {"validation.interval": 99, "checkpoint.interval": 0})
    assert stop.value.code == 5
    said = capsys.readouterr().err
    assert re.search(r"step 2: blocks\.0\.\S+, as step 1 left it, is not finite", said)
    assert "train.jsonl" not in said


def test_a_loss_that_is_not_finite_in_every_micro_batch_is_not_blamed_on_a_row(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    whole_loss = litpeft.train.step.summed_loss
    monkeypatch.setattr(litpeft.train.step, "summed_loss", lambda *args: whole_loss(*args) * torch.nan)
    with pytest.raises(SystemExit) as stop:
        train(tiny_folder, tmp_path / "run")
    assert stop.value.code == 5
    said = capsys.readouterr().err
    assert "step 1: the loss of all 4 rows of the step (" in said
    assert "the weights are at fault rather than a row" in said


def test_weights_that_are_not_finite_are_never_saved(tiny_folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        train(tiny_folder, tmp_path / "run", {"train.lr": 1e30, "train.max_norm": "null"})
    assert stop.value.code == 5
    for saved in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def against(folder: Path) -> Path:
    """Writes held-out rows that say other than the rows to learn: the better those are known, the worse these."""
    path = folder / "against.jsonl"
    rows = [{"instruction": f"Colour of {thing}?", "output": "zinc, I'd say"} for thing in ("sky", "grass")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_patience_ends_the_run_and_the_best_is_kept_and_taken(tiny_folder, tmp_path, capsys) -> None:
    trains = {"train.epochs": 40, "train.schedule": "constant", "data.validation_path": against(tmp_path)}
    ends = {"validation.interval": 1, "validation.patience": 3, "validation.final": "best", "checkpoint.keep_last": 1}
    settings: Settings = QUIET | trains | ends
    run = train(tiny_folder, tmp_path / "run", settings)
    losses = {row["step"]: row["val_loss"] for row in read_metrics(run) if row["val_loss"] is not None and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    text = (run / "report.md").read_text()
    assert f"of step {best:.0f} in 3 measurements, at step {best + 3:.0f} of 80" in text
    assert f"best {losses[best]:.3f} at step {best:.0f}" in text
    steps = Checkpoints(run / "checkpoints").steps()
    assert steps == [best, best + 3]
    facts = json.loads((run / "final/delta.json").read_text())
    assert (facts["step"], facts["finished"]) == (best, True)
    kept = Checkpoints(run / "checkpoints").at(int(best)).tensors("delta")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in delta(run).items())
    for step in steps:  # also where patience was at its end when it was killed
        again = cut(run, step, tmp_path / f"after-{step}")
        resume(tiny_folder, again, settings)
        assert (again / "final/delta.safetensors").read_bytes() == (run / "final/delta.safetensors").read_bytes()
        assert figures(again) == figures(run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / f"step-{best:08.0f}")
    with pytest.raises(SystemExit):
        resume(tiny_folder, run, settings)
    assert f"there is no checkpoint of step {best:.0f}" in capsys.readouterr().err


def test_the_best_by_exact_answers_is_kept(tiny_folder, tmp_path) -> None:
    exact = {"validation.metric": "exact", "validation.final": "best", "validation.interval": 10}
    learns = {"train.epochs": 30, "train.schedule": "constant", "checkpoint.keep_last": 1, "train.lr": 2e-3}
    run = train(tiny_folder, tmp_path / "run", QUIET | learns | exact, "full")
    shares = [(row["val_exact"], -row["step"]) for row in read_metrics(run) if row["val_exact"] is not None]
    share, step = max(share for share in shares if share[1])
    assert share > 0
    assert -step < 60
    assert Checkpoints(run / "checkpoints").steps() == [-step, 60]
    assert json.loads((run / "final/delta.json").read_text())["step"] == -step


def test_a_disk_that_is_full_keeps_the_checkpoints_before(long_run, tiny_folder, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(words(tiny_folder, run, LONG), tmp_path / "said")
    wait_for_step(run, 5, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))  # the optimizer's file is larger
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 6, said
    step = newest(run).step
    assert 4 <= step < 40
    assert "is not written, the ones before are as they were" in said
    assert_same(resume(tiny_folder, run, LONG), long_run)


def test_too_small_a_disk_is_told_before_the_run(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)
    whole = train(tiny_folder, tmp_path / "whole", {"checkpoint.keep_last": 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700_000))
    with pytest.raises(SystemExit) as stop:
        train(tiny_folder, tmp_path / "run", {"checkpoint.keep_last": 2})
    assert stop.value.code == 6
    said = capsys.readouterr().err
    need, left, short = re.search(
        r"the checkpoints need (.+) kB, the disk has (.+) kB left: (.+) kB too little", said
    ).groups()
    assert left == "700.0"
    assert abs(float(need) - 700.0 - float(short)) < 0.11
    assert not (tmp_path / "run").exists()
    resume(tiny_folder, cut(whole, 3, tmp_path / "again"), {"checkpoint.keep_last": 2})  # most of it is there already


def test_a_run_killed_at_random_instants_is_lost_in_no_part(long_run, tiny_folder, tmp_path) -> None:
    kills(tiny_folder, long_run, tmp_path, 5, LONG, "lora", seed=0)
