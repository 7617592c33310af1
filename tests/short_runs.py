"""Short runs of a tiny model that are ended and resumed, and what tells whether that left a trace."""

import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest
import torch
from conftest import needed, read_metrics, write_rows
from safetensors.torch import load_file
from torch import Tensor

import litpeft.train.step
from litpeft.cli import main
from litpeft.train.checkpoints import Checkpoint, Checkpoints

SETTINGS = {
    "train.epochs": 2,
    "train.batch_size": 4,  # of six rows: a step of four and one of two in each epoch
    "train.micro_tokens": 50,  # a row has at most 43: several micro-batches a step
    "train.warmup_steps": 0,
    "train.lr": 1e-2,
    "base.precision": "32-true",
    "validation.interval": 1,
    "validation.sample_tokens": 4,
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 99,
}
UNPACKED = {"data.packing": False, "train.micro_tokens": "auto", "train.micro_batch_size": 2}
QUIET = {"validation.sample_tokens": 0}
LONG = QUIET | {"train.epochs": 20, "validation.interval": 4}  # 40 steps
Settings = dict[str, object]


def words(base: Path, out: Path, settings: Settings | None = None, method: str = "lora") -> list[str]:
    """Returns the command line of a run on the small rows, which lie beside its folder."""
    places = {"base.dir": base, "data.path": write_rows(out.parent), "out": out}
    told = {key.removeprefix("--"): value for key, value in needed(method).items()}
    pairs = (SETTINGS | told | places | (settings or {})).items()
    return ["finetune", method, *(word for key, value in pairs for word in (f"--{key}", as_text(value)))]


def as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def train(base: Path, out: Path, settings: Settings | None = None, method: str = "lora") -> Path:
    """Trains in this process; returns the run's folder."""
    main(words(base, out, settings, method))
    return out


def resume(base: Path, out: Path, settings: Settings | None = None, method: str = "lora") -> Path:
    return train(base, out, {"resume": True} | (settings or {}), method)


def cut(run: Path, step: int, to: Path) -> Path:
    """Copies a run as it would be if it had been killed after the checkpoint of a step; returns the copy."""
    shutil.copytree(run, to)
    for path in ("final", "report.md", "loss.png"):
        shutil.rmtree(to / path) if (to / path).is_dir() else (to / path).unlink()
    for folder in (to / "checkpoints").iterdir():
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    return to


def newest(run: Path) -> Checkpoint:
    """Returns the newest checkpoint of a run, which must be whole."""
    told: list[str] = []
    found = Checkpoints(run / "checkpoints", tell=told.append, clear=False).newest()
    assert found is not None
    assert not told
    return found


def figures(run: Path) -> list[dict]:
    """Returns the rows of metrics.csv without what the clock says."""
    clock = ("tokens_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in clock} for row in read_metrics(run)]


def told(run: Path) -> list[str]:
    """Returns the lines of the report that say what was learned."""
    lines = re.sub("`[^`\n]*/", "`", (run / "report.md").read_text()).splitlines()  # wherever the rows lie
    return [line for line in lines if "nats" in line or "Colour of" in line]


def assert_same(run: Path, reference: Path) -> None:
    """Both runs have learned the same to the last bit, and say the same of it."""
    names = [path.relative_to(reference) for path in (reference / "final").glob("*.safetensors")]
    assert names
    for name in names:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    saved, expected = newest(run), newest(reference)
    assert saved.step == expected.step
    for stem in ("delta", "optimizer"):
        assert same_tensors(saved.tensors(stem), expected.tensors(stem)), stem
    for key in ("losses", "validations", "best", "waited", "tokens", "trained_tokens", "epoch", "samples"):
        assert saved.state["progress"][key] == expected.state["progress"][key], key
    assert saved.state["optimizer"] == expected.state["optimizer"]
    assert figures(run) == figures(reference)
    assert told(run) == told(reference)
    assert not leftovers(run)


def same_tensors(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in some.items()
    )


def delta(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "delta.safetensors")


def leftovers(run: Path) -> list[Path]:
    return [*run.parent.glob(f".tmp-{run.name}-*"), *run.rglob(".tmp-*"), *run.rglob("*.part")]


def told_and_run(argv: list[str], log: Path) -> None:
    """What a process of its own does: the command, with what it says in a file."""
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main(argv)


def forked(action: Callable[..., object], *args: object) -> multiprocessing.process.BaseProcess:
    """Returns a process that does `action`, forked from a small one that has all imported: it starts at once.

    To fork the process of the tests, which has grown by then, would take a tenth of a second.
    """
    server = multiprocessing.get_context("forkserver")
    modules = ["litpeft.train.finetune", "litpeft.methods.lora", "conftest", "short_runs", "test_checkpoints"]
    server.set_forkserver_preload(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of itself it finds no module of the tests
        ensure_running()
    process = server.Process(target=action, args=args)
    process.start()
    return process


def start(argv: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """Returns a process that runs the command."""
    return forked(told_and_run, argv, log)


def wait_for_step(run: Path, step: int, process: multiprocessing.process.BaseProcess) -> None:
    """Returns when metrics.csv has this step."""
    while process.is_alive():
        metrics = run / "metrics.csv"
        if metrics.exists() and f"\n{step}," in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended with {process.exitcode} before step {step}")


def poisoned(monkeypatch: pytest.MonkeyPatch, call: int, spoil: Callable[[Tensor], Tensor]) -> None:
    """Has `spoil` act on the loss of one of the run's micro-batches."""
    calls, summed_loss = count(1), litpeft.train.step.summed_loss

    def loss(model: torch.nn.Module, batch: object) -> Tensor:
        value = summed_loss(model, batch)
        return spoil(value) if next(calls) == call else value

    monkeypatch.setattr(litpeft.train.step, "summed_loss", loss)


def kills(base: Path, whole: Path, folder: Path, number: int, settings: Settings, method: str, seed: int) -> None:
    """Kills runs at random instants until it was done `number` times, and resumes them; all must become as `whole`."""
    chance, done = random.Random(seed), 0
    for name in count():
        run = folder / f"run-{name}"
        at = -1
        while True:
            process = start(words(base, run, settings | {"resume": True}, method), folder / "said")
            if done < number:
                process.join(chance.uniform(0.2, 1.5))
                done += process.is_alive()
                process.kill()
            process.join()
            if (process.exitcode or 0) >= 0:
                break
            saved = newest(run).step if list(run.glob("checkpoints/step-*")) else -1
            assert saved >= at
            at = saved
        assert process.exitcode == 0, (folder / "said").read_text()
        assert_same(run, whole)
        if done >= number:
            return
