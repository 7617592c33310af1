"""The processes of a run on several devices: how they are started, what they see, and how they all end.

A short script stands for the program in most tests. `run` returns only when all processes that hold its stdout have
ended, so that each of its uses tells as well that no rank is left behind.
"""

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from ranks import forked
from torch.distributed.fsdp import fully_shard

import litpeft.train.launch
from litpeft.core.errors import PEER_LOST, STOPPED, ConfigError, UserError
from litpeft.train.launch import check_world, launch, leave, peer_lost, rank_environment, started_by

ROOT = Path(__file__).parent.parent
PARENT = """
import sys
from litpeft.train import launch
launch.PATIENCE = 0.5
devices, nodes, grace, script = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
sys.exit(launch.launch(sys.argv[5:], devices, nodes, command=[sys.executable, "-c", script], grace=grace))
"""
RANK = """
import json, os, signal, sys, time
from litpeft.train.launch import launch, leave, peer_lost
assert launch([], 2, 1) is None
rank = int(os.environ["LOCAL_RANK"])
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, whatever the other rank writes
"""
GLOO = """
import datetime, torch.distributed as dist
os.environ["RANK"] = str(rank)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
dist.barrier()
"""


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests begin in an environment in which nobody has started ranks."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_", "LITPEFT_", "OMP_")) or name.endswith("_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(script: str, *argv: object, devices: int = 2, nodes: int = 1, grace: float = 10) -> subprocess.Popen[str]:
    """Starts a parent with its ranks, in a process group of its own as a terminal's shell does."""
    command = [sys.executable, "-c", PARENT, devices, nodes, grace, RANK + script, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(map(str, command), stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(script: str, *argv: object, **how: float) -> tuple[int, str, str]:
    """Returns the exit code of a parent and what it and its ranks wrote to stdout and stderr."""
    parent = start(script, *argv, **how)
    out, err = parent.communicate(timeout=120)
    return parent.returncode, out, err


@pytest.mark.parametrize(("codes", "expected"), [("00", 0), ("03", 3), ("50", 5), ("44", 4)])
def test_the_run_ends_with_the_code_of_the_rank_that_ended_badly(codes: str, expected: int) -> None:
    assert run("sys.exit(int(sys.argv[1][rank]))", codes) == (expected, "", "")


@pytest.mark.parametrize("first", ["sys.exit(7)", "os.abort()"])
def test_a_rank_that_saw_another_go_does_not_hide_why_it_went(first: str) -> None:
    assert run(f"time.sleep(rank)\nif rank == 0:\n    {first}\nsys.exit(3)")[0] == 3


def test_a_rank_that_leaves_says_all_it_had_to_say() -> None:
    assert run("sys.stdout.write('last words'); leave(5 * rank)") == (5, "last words" * 2, "")


def test_ranks_that_agreed_to_stop_have_all_the_time_they_need_to_save() -> None:
    code, out, _ = run("time.sleep(2 * rank); say('saved'); sys.exit(75)", grace=0.1)
    assert (code, out) == (STOPPED, "saved\nsaved\n")


def test_a_killed_rank_is_noticed_by_the_others_and_told() -> None:
    script = """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    dist.all_reduce(torch.ones(4))
except RuntimeError as error:
    say("lost", peer_lost(error), error)
    leave(7)
"""
    code, out, err = run("import torch\n" + GLOO + script)
    assert code == PEER_LOST
    assert out.startswith("lost True [")
    assert "litpeft: error: rank 1 was killed by SIGKILL" in err
    assert "rank 0" not in err  # it ended by itself, without an abort


def test_a_rank_that_stands_still_is_noticed_and_ended() -> None:
    script = """
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    dist.all_reduce(torch.ones(4))
except RuntimeError as error:
    say(peer_lost(error))
    leave(7)
"""
    code, out, err = run("import torch\n" + GLOO + script, grace=0.5)
    assert (code, out) == (PEER_LOST, "True\n")
    assert "rank 1 did not end by itself: SIGKILL" in err
    assert "rank 0" not in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("work", ["ddp", "fsdp", "group"])
def test_a_lost_rank_is_known_inside_a_model_too(
    work: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        seconds = timedelta(seconds=2)
        dist.init_process_group("gloo", timeout=seconds)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        model = torch.nn.parallel.DistributedDataParallel(model) if work == "ddp" else model
        model = fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,))) if work == "fsdp" else model
        try:
            for step in range(5):
                loss = model(torch.ones(2, 8)).sum()
                if step == 3 and rank == 1:
                    os.kill(os.getpid(), getattr(signal, how))
                loss.backward()
                if work == "group":
                    dist.new_group([0, 1], timeout=seconds)
        except RuntimeError as error:
            print("not known:", error) if not peer_lost(error) else leave(7)

    monkeypatch.setattr(litpeft.train.launch, "PATIENCE", 0.5)
    ranks = forked(steps, tmp_path / "log")
    assert ranks.wait(grace=0.5) == PEER_LOST
    assert "not known" not in ranks.said


def test_a_rank_that_hears_nothing_gets_sigterm_when_the_grace_is_over() -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: (say("asked"), os._exit(75)))
time.sleep(0.5 if rank else 100)
sys.exit(3)
"""
    assert run(script, grace=0.5)[:2] == (3, "asked\n")


def test_ranks_see_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")  # an allocation in which nothing was started with srun
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = "say(json.dumps(dict(os.environ)))"
    seen = sorted((json.loads(line) for line in run(script)[1].splitlines()), key=lambda own: own["LOCAL_RANK"])
    assert [own["LOCAL_RANK"] for own in seen] == ["0", "1"]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for own in seen:
        assert (own["WORLD_SIZE"], own["NODE_RANK"], own["MASTER_ADDR"]) == ("2", "0", "127.0.0.1")
        assert own["OMP_NUM_THREADS"] == str(max(1, usable // 2))
        assert own["MASTER_PORT"] == seen[0]["MASTER_PORT"]
        assert "SLURM_NTASKS" not in own
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert json.loads(run(script, devices=1)[1])["OMP_NUM_THREADS"] == "3"


def test_fabric_takes_the_ranks_for_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")

    def add_up(rank: int) -> None:
        assert launch([], 2, 1) is None
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        total = fabric.all_reduce(torch.tensor(float(1 + fabric.global_rank)), reduce_op="sum")
        print(fabric.world_size, int(total))
        leave(0)

    ranks = forked(add_up, tmp_path / "log", **rank_environment(2, 1))
    assert ranks.wait() == 0
    assert [line for line in ranks.said.splitlines() if line[0].isdigit()] == ["2 3", "2 3"]


def test_a_second_node_numbers_its_ranks_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    script = "say(*(os.environ[n] for n in ('WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT')))\n"
    code, out, err = run(script + "rank and os.kill(os.getpid(), signal.SIGKILL)", nodes=2)
    assert (code, out) == (PEER_LOST, "4 1 10.0.0.1 29500\n" * 2)
    assert "rank 3 was killed" in err


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"MASTER_PORT": "1"}, "with num_nodes 2 the environment must say MASTER_ADDR, NODE_RANK"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x", "NODE_RANK": "0"}, "MASTER_PORT must be a number from 0, got 'x'"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "2"}, "but with num_nodes 2 it is at most 1"),
    ],
)
def test_a_node_must_know_its_place(environment: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=what):
        launch([], 2, 2)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_reaches_each_rank_once(name: str) -> None:
    script = """
came = []
signal.signal(getattr(signal, sys.argv[1]), lambda number, frame: came.append(number))
say("ready")
for wanted in (1, 2):
    while len(came) < wanted:
        time.sleep(0.01)
    time.sleep(0.5)
    say(len(came))
sys.exit(75)
"""
    parent = start(script, name)
    assert [parent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.killpg(parent.pid, getattr(signal, name))  # as a terminal sends it, to all of the group
    assert [parent.stdout.readline() for _ in range(2)] == ["1\n"] * 2
    os.kill(parent.pid, getattr(signal, name))
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out, err) == (STOPPED, "2\n2\n", "")


def test_a_signal_before_the_ranks_can_handle_it_is_told_as_a_shell_tells_it() -> None:
    parent = start("say('ready'); time.sleep(100)")
    assert [parent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    parent.terminate()
    assert parent.communicate(timeout=60) == ("", "")
    assert parent.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_no_rank_outlives_a_killed_parent(platform: str) -> None:
    script = RANK.replace("assert", f"sys.platform = {platform!r}\nassert") + "say('ready'); time.sleep(100)"
    command = [sys.executable, "-c", PARENT, "2", "1", "10", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    parent.kill()
    assert parent.communicate(timeout=60)[0] == ""  # ends when the last rank does


TORCHRUN = {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "starter"),
    [(TORCHRUN, "torchrun"), (SLURM, "SLURM"), ({"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "the environment")],
)
def test_ranks_of_others_go_on_and_their_number_is_checked(
    environment: dict[str, str], starter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_by() == starter
    assert TorchElasticEnvironment.detect() is (starter == "torchrun")
    assert SLURMEnvironment.detect() is (starter == "SLURM")
    assert launch([], 2, 2) is None
    check_world(2, 2)
    what = f"{starter} started another number of processes than the settings say: .* is 4, devices x num_nodes 8"
    with pytest.raises(ConfigError, match=what) as refused:
        check_world(8, 1)
    if "LOCAL_RANK" not in environment or "LOCAL_WORLD_SIZE" in environment:
        assert "say --devices 2 --num_nodes 2" in refused.value.hint
        with pytest.raises(UserError, match=" is 2, devices 1"):
            check_world(1, 4)


def test_slurm_must_say_how_many_tasks_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, SLURM[name])
    with pytest.raises(UserError, match="how many on each node") as refused:
        check_world(2, 2)
    assert "--ntasks-per-node=2" in refused.value.hint
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert started_by() is None
    check_world(2, 2)


def test_other_errors_are_no_lost_peer() -> None:
    assert not peer_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not peer_lost(ConnectionResetError("Connection reset by peer"))  # of a download
