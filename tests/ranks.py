"""Runs of `litpeft` on several ranks, forked from the process of the tests: they start in a moment, not in seconds.

A rank calls the command line as a started one does; `launch.watch` watches them as it watches those that it started.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO, TextIOWrapper
from pathlib import Path

import torch
from conftest import read_metrics
from safetensors.torch import load_file

from litpeft import cli
from litpeft.cli import help, yaml_keys  # noqa: F401 - forked ranks have them already
from litpeft.train import fabric, finetune, loss_figure  # noqa: F401 - the same
from litpeft.train.launch import PARENT, free_port, watch

Hook = Callable[[int], object]  # done in each rank before its command, e.g. to let it fail at some place


class Rank:
    """A forked process, as `launch.watch` knows those of subprocess.Popen."""

    returncode: int | None = None

    def __init__(self, action: Callable[[], object], environment: dict[str, str], log: Path):
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_"))]:
                del os.environ[name]
            os.environ |= environment
            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (TextIOWrapper(FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2))
            action()
            os._exit(0)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException as error:
            traceback.print_exception(error)
        finally:
            os._exit(99)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@dataclass
class Ranks:
    """A run: its ranks, what they print, and where."""

    ranks: list[Rank]
    log: Path
    asked: list[int] = field(default_factory=list)  # signals to the parent

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self, grace: float = 10.0) -> int:
        """Returns the exit code of the run."""
        return watch(self.ranks, 0, self.asked, grace)


def start(log: Path, *argv: object, world: int = 2, hook: Hook | None = None, **environment: str) -> Ranks:
    """Starts a command on `world` ranks; further names are variables of their environment."""
    command = [*map(str, argv), "--devices", str(world)] if world > 1 else [*map(str, argv)]
    name = " ".join(command[:2])
    cli.parser_of(name, cli.COMMANDS[name])  # kept for the ranks; see conftest.py

    def action(rank: int) -> None:
        torch.set_num_threads(1)
        if hook is not None:
            hook(rank)
        cli.main(command)

    return forked(action, log, world, **environment)


def forked(action: Callable[[int], object], log: Path, world: int = 2, **environment: str) -> Ranks:
    """Starts processes that do `action` and see where they stand, as those that `litpeft` starts."""
    log.unlink(missing_ok=True)
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    common[PARENT] = str(os.getpid())
    ranks = []
    for rank in range(world):
        own = common | {"LOCAL_RANK": str(rank)} if world > 1 else {}
        ranks.append(Rank(lambda rank=rank: action(rank), own | environment, log))
    return Ranks(ranks, log)


def run(log: Path, *argv: object, **how: object) -> tuple[int, str]:
    """Returns the exit code of a command on several ranks, and what they printed."""
    ranks = start(log, *argv, **how)
    return ranks.wait(), ranks.said


@dataclass
class Result:
    """What a run left."""

    delta: dict[str, torch.Tensor]
    losses: list[float]
    validations: list[float]
    ending: list[float]  # losses measured at the end: of neutral text, and of the hardest rows

    @classmethod
    def of(cls, out: Path) -> "Result":
        rows = read_metrics(out)
        delta = {k: v for path in sorted((out / "final").glob("*.safetensors")) for k, v in load_file(path).items()}
        losses, validations = ([r[key] for r in rows if r[key] is not None] for key in ("loss", "val_loss"))
        report = json.loads((out / "report.json").read_text())
        rows = report["rows"]["hardest"] if report["rows"] else []  # none of pairs of answers
        ending = [*report["neutral"], *(row["after"] for row in rows), *(n for one in report["preferred"] for n in one)]
        return cls(delta, losses, validations, ending)

    def apart(self, other: "Result") -> float:
        """Returns the largest difference of any number of both."""
        assert self.delta.keys() == other.delta.keys()
        assert (len(self.losses), len(self.validations)) == (len(other.losses), len(other.validations))
        pairs = [*zip(self.losses, other.losses, strict=True)]
        pairs += zip(self.validations, other.validations, strict=True)
        pairs += zip(self.ending, other.ending, strict=True)
        far = [float((self.delta[k].double() - other.delta[k].double()).abs().max()) for k in self.delta]
        return max(*far, *(abs(a - b) for a, b in pairs))
