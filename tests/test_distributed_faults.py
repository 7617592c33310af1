"""What goes wrong on one of two ranks ends both, soon and with the documented code, and the run can go on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_folder, write_rows
from ranks import Hook, Ranks, Result, run, start

from litpeft.train import checkpoints, preparation
from litpeft.train import step as steps
from litpeft.train.checkpoints import Checkpoints
from litpeft.train.launch import free_port
from litpeft.train.step import Stepper

ROOT = Path(__file__).parent.parent
ARGUMENTS = "--train.warmup_steps 0 --train.batch_size 4 --train.epochs 4 --train.lr 1e-2 --base.precision 64-true"
EACH_STEP = "--checkpoint.interval 1 --validation.interval 2 --validation.sample_tokens 2"


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `base`, rows in `data`, and a run on two ranks each in `ddp` and `fsdp`."""
    folder = tmp_path_factory.mktemp("faults")
    make_folder(folder / "base")
    write_rows(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for strategy in ("ddp", "fsdp"):
            assert run(folder / "log", *command(folder, folder / strategy, "--strategy", strategy))[0] == 0
        yield folder


def command(folder: Path, out: Path, *argv: object) -> list[str]:
    given = ["--base.dir", folder / "base", "--data.path", folder / "data", "--out", out]
    given = {given[i]: given[i + 1] for i in (0, 2, 4) if given[i] not in argv}
    words = [str(word) for pair in given.items() for word in pair]
    return ["finetune", "lora", *words, *ARGUMENTS.split(), *EACH_STEP.split(), *map(str, argv)]


def at_step(step: int, rank: int, action: Callable[[], object]) -> Hook:
    """Does something on one rank just before an optimizer step."""

    def hook(own: int) -> None:
        real = Stepper.step
        Stepper.step = lambda *args: (action() if (args[4], own) == (step, rank) else None, real(*args))[1]

    return hook


def inside_save(step: int, action: Callable[[], object]) -> Hook:
    """Does something on the rank that writes, in the midst of the checkpoint of a step."""

    def hook(own: int) -> None:
        real = checkpoints.save_tensors

        def save(tensors: dict, path: Path) -> None:
            if path.stem == "optimizer" and f"{step:08d}" in path.parent.name:
                action()
            real(tensors, path)

        checkpoints.save_tensors = save

    return hook


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise KeyError("of a bug")


def no_number() -> None:
    """From here on the loss of this rank's rows is NaN."""
    real = steps.summed_loss
    steps.summed_loss = lambda model, batch: real(model, batch) * (float("nan") if len(batch.targets) else 1)


def no_gradient() -> None:
    real = torch.Tensor.backward
    torch.Tensor.backward = lambda loss, *args, **kwargs: real(loss * float("nan"), *args, **kwargs)


# what happens: the exit code, what is said once, and the steps whose checkpoints are there then
FAULTS = {
    "rank 1 killed": (at_step(4, 1, kill), 7, "another rank of the run is gone", [2, 3]),
    "rank 0 killed": (at_step(4, 0, kill), 7, "another rank of the run is gone", [2, 3]),
    "rank 1 fails": (at_step(4, 1, fail), 70, "internal error: KeyError: 'of a bug'", [2, 3]),
    "rank 0 fails": (at_step(4, 0, fail), 70, "internal error: KeyError: 'of a bug'", [2, 3]),
    "rank 1 leaves": (at_step(4, 1, lambda: os._exit(3)), 3, "another rank of the run is gone", [2, 3]),
    "killed in a save": (inside_save(3, kill), 7, "another rank of the run is gone", [1, 2]),
    "failed in a save": (inside_save(3, fail), 70, "internal error: KeyError: 'of a bug'", [1, 2]),
    "no number": (at_step(5, 1, no_number), 5, "step 5: the loss of rows {data}/train.jsonl:", [3, 4]),
    "no gradient": (at_step(3, 1, no_gradient), 5, "step 3: the gradient of blocks.0.", [1, 2]),
    "rank 1 asked": (at_step(4, 1, ask), 75, "SIGTERM at step 4 of 8", [2, 3, 4]),
    "rank 0 asked": (at_step(4, 0, ask), 75, "SIGTERM at step 4 of 8", [2, 3, 4]),
}
QUICK = ("rank 1 killed", "rank 0 fails", "killed in a save", "no number", "no gradient", "rank 1 asked")


def check_fault(fault: str, strategy: str, folder: Path, tmp_path: Path) -> None:
    hook, code, told, steps = FAULTS[fault]
    argv = command(folder, tmp_path / "run", "--strategy", strategy)
    ended, said = run(tmp_path / "log", *argv, hook=hook)
    assert ended == code, said
    assert said.count(told.format(data=folder / "data")) == 1, said
    assert Checkpoints(tmp_path / "run" / "checkpoints", clear=False).steps() == steps
    assert (tmp_path / "run" / "final").exists() is (code == 75)
    ended, said = run(tmp_path / "log", *argv, "--resume", "true")
    assert ended == 0, said
    assert Result.of(tmp_path / "run").apart(Result.of(folder / strategy)) == 0
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("fault", QUICK)
def test_a_fault_on_one_rank_ends_both_and_the_run_goes_on(fault: str, folder: Path, tmp_path: Path) -> None:
    check_fault(fault, "ddp", folder, tmp_path)


OTHERS = [  # each fault once more, or the one time; `-m full` has those that are not in QUICK with both strategies
    *(pytest.param(fault, "fsdp", marks=pytest.mark.slow if fault in QUICK else pytest.mark.full) for fault in FAULTS),
    *(pytest.param(fault, "ddp", marks=pytest.mark.slow) for fault in FAULTS if fault not in QUICK),
]


@pytest.mark.parametrize(("fault", "strategy"), OTHERS)
def test_every_fault_on_one_rank_ends_both(fault: str, strategy: str, folder: Path, tmp_path: Path) -> None:
    check_fault(fault, strategy, folder, tmp_path)


def train_until_asked(folder: Path, out: Path, strategy: str) -> Ranks:
    """Returns a long run that has taken some steps."""
    argv = command(folder, out, "--strategy", strategy, "--train.epochs", 10000, "--checkpoint.interval", 0)
    ranks = start(out.parent / "log", *argv)
    metrics = out / "metrics.csv"
    while all(rank.poll() is None for rank in ranks.ranks) and not (
        metrics.exists() and metrics.read_text().count("\n") > 8
    ):
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_the_parent_ends_the_run_with_a_checkpoint(strategy: str, folder: Path, tmp_path: Path) -> None:
    ranks = train_until_asked(folder, tmp_path / "run", strategy)
    ranks.asked.append(signal.SIGTERM)
    assert ranks.wait() == 75, ranks.said
    assert (tmp_path / "run" / "final" / "delta.json").exists()
    last = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert f"SIGTERM at step {last.step} of" in ranks.said


def other_rows(rank: int) -> None:
    real = preparation.rows_sha256
    preparation.rows_sha256 = lambda *rows: f"{real(*rows)} {rank}"


@pytest.mark.parametrize(
    ("argv", "hook", "code", "told"),
    [
        (("--out", "{folder}/ddp"), None, 2, "litpeft: error: {folder}/ddp: the output exists"),
        (("--out", "{folder}/ddp", "--strategy", "fsdp"), None, 2, "litpeft: error: {folder}/ddp: the output"),
        (("--data.path", "{folder}/bad.jsonl"), None, 3, "bad.jsonl:1: output is missing"),
        (("--method.targets", '["*.atn.q"]'), None, 2, '(did you mean "*.attn.q"?)'),
        (("--train.optimizer", "AdamV"), None, 2, "torch.optim has no 'AdamV' (did you mean \"Adam\"?)"),
        ((), other_rows, 2, "litpeft: error: devices: the ranks differ in the rows"),
    ],
)
def test_an_error_that_all_ranks_find_is_told_once(
    argv: tuple, hook: Hook | None, code: int, told: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "bad.jsonl").write_text('{"instruction": "x"}\n')
    argv = [word.replace("{folder}", str(folder)) for word in argv]
    ended, said = run(tmp_path / "log", *command(folder, tmp_path / "run", *argv), hook=hook)
    assert (ended, said.count(told.replace("{folder}", str(folder))), said.count("error: ")) == (code, 1, 1), said
    assert "did not end by itself" not in said


@pytest.mark.parametrize(
    "argv",
    [("--validation.metric", "exact", "--validation.patience", 2), ("--validation.patience", 1, "--train.lr", 0.3)],
)
def test_ranks_agree_when_to_stop_and_which_step_was_best(argv: tuple, folder: Path, tmp_path: Path) -> None:
    argv = "--train.epochs", 20, "--validation.interval", 1, "--validation.final", "best", *argv
    reasons = []
    for name, world in (("one", 1), ("ddp", 2), ("fsdp", 2)):
        spread = () if world == 1 else ("--strategy", name)
        code, said = run(tmp_path / "log", *command(folder, tmp_path / name, *argv, *spread), world=world)
        assert code == 0, said
        reasons.append(re.search(r"no (better loss|more exact answers) than .* at step \d+ of 40", said)[0])
    assert reasons[0] == reasons[1] == reasons[2]
    one = Result.of(tmp_path / "one")
    assert all(Result.of(tmp_path / strategy).apart(one) <= 1e-6 for strategy in ("ddp", "fsdp"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_stop_together_when_the_time_is_over(strategy: str, folder: Path, tmp_path: Path) -> None:
    argv = command(folder, tmp_path / "run", "--strategy", strategy, "--train.epochs", 10000)
    code, said = run(tmp_path / "log", *argv, "--train.max_time", "0.01")
    assert (code, said.count("max_time reached at step")) == (0, 1)


SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "train"}
SLURM |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "4711"}


def as_slurm(rank: int) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR"):
        del os.environ[name]
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}


def test_processes_that_slurm_starts_are_the_ranks(folder: Path, tmp_path: Path) -> None:
    argv = command(folder, tmp_path / "run", "--strategy", "ddp")
    code, said = run(tmp_path / "log", *argv, hook=as_slurm, **SLURM)
    assert code == 0, said
    assert Result.of(tmp_path / "run").apart(Result.of(folder / "ddp")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_the_ranks(nodes: int, folder: Path, tmp_path: Path) -> None:
    each, port = 2 // nodes, str(free_port())
    argv = command(folder, tmp_path / "run", "--strategy", "ddp", "--devices", each, "--num_nodes", nodes)
    place = "--master_addr", "127.0.0.1", "--master_port", port, "--nnodes", str(nodes)
    agents = [torchrun(*place, "--node_rank", str(n), "--nproc_per_node", str(each), argv=argv) for n in range(nodes)]
    said = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * nodes, said
    assert Result.of(tmp_path / "run").apart(Result.of(folder / "ddp")) <= 1e-10
    assert said[1:] == [""] * (nodes - 1)


@pytest.mark.slow
def test_torchrun_with_another_number_of_ranks_is_told_what_to_say(folder: Path, tmp_path: Path) -> None:
    argv = command(folder, tmp_path / "run", "--devices", 1)
    agent = torchrun("--master_port", str(free_port()), "--nproc_per_node", "2", argv=argv)
    said = agent.communicate()[0]
    assert agent.returncode != 0
    assert said.count("litpeft: error: devices: torchrun started another number of processes") == 1
    assert "hint: say --devices 2 --num_nodes 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_starts_its_own_ranks(folder: Path, tmp_path: Path) -> None:
    argv = command(folder, tmp_path / "run", "--strategy", "fsdp", "--devices", 2)
    subprocess.run([sys.executable, "-m", "litpeft", *argv], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert Result.of(tmp_path / "run").apart(Result.of(folder / "fsdp")) <= 1e-10
    shutil.rmtree(tmp_path / "run")


def torchrun(*options: str, argv: list[str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "litpeft", *argv]
    # without torch's own warnings: an agent that asks another that has just ended gets one
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
