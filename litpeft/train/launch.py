"""Starts one process for each device of a run, and ends them.

With more than one device `litpeft finetune` becomes a parent process: it starts the command again for each device, as a
rank of torch.distributed, passes signals on, and returns one exit code. torchrun or SLURM may start the ranks instead.
This file does not import torch, since the parent needs no model and no device.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from litpeft.core.errors import INTERRUPTED, PEER_LOST, STOPPED, ConfigError, ResourceError
from litpeft.core.terminal import tell

PARENT = "LITPEFT_LAUNCHER"  # environment variable of a rank: the process id of the parent that launched it
GRACE = 10.0  # seconds for the other ranks to end by themselves after one has failed
PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL
POLL = 0.1  # seconds between checks of the ranks
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# Texts of a RuntimeError when another rank is gone; gloo has no exception class for it. Seen with torch 2.13 when a
# rank was killed, stopped or raised; the last five are known from reports.
LOST = (
    "Connection closed by peer",  # gloo: it ended
    "Timed out waiting",  # gloo: it hangs
    "Application timeout caused pair closure",  # gloo: and the next operation
    "failed to pass monitoredBarrier",
    "Connection was likely closed",  # the store, which lives in rank 0
    "client socket has timed out",
    "waiting for clients",
    "wait timeout after",
    "Connection reset by peer",  # gloo: it ended with data unread
    "Broken pipe",
    "connectFullMesh failed",
    "remote process exited",  # NCCL
    "Connection closed by remote peer",
)


def launch(
    argv: Sequence[str], devices: int, num_nodes: int, *, command: Sequence[str] = (), grace: float = GRACE
) -> int | None:
    """Runs `command` (default: this program) with `argv` for each device; returns the exit code of the run.

    Returns None in a process that is a rank already: the caller then does the work.
    """
    if started_by() is not None:
        if PARENT in os.environ:
            die_with_parent(int(os.environ[PARENT]))
        return None
    environment = rank_environment(devices, num_nodes)
    command = [*(command or (sys.executable, "-m", "litpeft")), *argv]
    asked: list[int] = []  # signals to pass on, once all ranks are started
    before = {number: signal.signal(number, lambda n, frame: asked.append(n)) for number in to_catch()}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank in range(devices):
            own = environment | {"LOCAL_RANK": str(local_rank)}
            # a session of its own: a rank gets Ctrl-C once, from this process, and cannot read the terminal
            rank = subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True)
            ranks.append(rank)
        return watch(ranks, int(environment["NODE_RANK"]) * devices, asked, grace)
    finally:
        for rank in ranks:
            rank.kill()  # does nothing to those that have ended
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(ranks: list[subprocess.Popen[bytes]], first: int, asked: list[int], grace: float) -> int:
    """Passes signals on until all ranks have ended; returns the exit code of the run.

    `first` is the global rank of ranks[0]; `asked` gets the signals to this process.
    """
    passed_on: set[int] = set()
    bad: dict[int, int] = {}  # global rank -> return code of those that failed by themselves, in that order
    due, means = float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while True:
        codes = {first + number: rank.poll() for number, rank in enumerate(ranks)}
        running = [rank for rank in ranks if rank.returncode is None]
        forced = len(means) < 2  # exits after our SIGTERM are not failures of the ranks
        for number, code in codes.items():
            if code and number not in bad and not forced:
                bad[number] = code
                if code < 0 and -code not in passed_on:
                    hint = "the kernel does this when memory runs out; `dmesg` tells" if code == -signal.SIGKILL else ""
                    error = ResourceError(f"rank {number} was killed by {signal.Signals(-code).name}", hint=hint)
                    tell(f"litpeft: {error}")
                # after a requested stop the others may still be saving: do not hurry them
                if code not in (STOPPED, INTERRUPTED):
                    due = min(due, time.monotonic() + grace)
        if not running:
            return exit_code(list(bad.values()), passed_on)
        while asked:
            passed_on.add(asked[0])
            send(running, asked.pop(0))
        if time.monotonic() >= due and means:
            late = ", ".join(str(number) for number, code in codes.items() if code is None)
            tell(f"litpeft: rank {late} did not end by itself: {means[0].name}")
            send(running, means.pop(0))
            due = time.monotonic() + PATIENCE
        time.sleep(POLL)


def send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def exit_code(bad: list[int], passed_on: set[int]) -> int:
    """Returns the exit code of the run: that of the first rank that failed for a reason of its own.

    PEER_LOST is none: it follows from another rank's failure, as does SIGABRT, with which gloo's threads and NCCL's
    watchdog end a process whose peer is gone.
    """
    own = [code for code in bad if code not in (PEER_LOST, -signal.SIGABRT)]
    cause = own[0] if own else PEER_LOST if bad else 0
    if cause >= 0:
        return cause
    # killed by a signal that was passed on before the rank could handle it: the shell's exit code for that
    return 128 - cause if -cause in passed_on else PEER_LOST


def leave(code: int) -> NoReturn:
    """Ends a command with `code`; an error outside of a rank ends it by SystemExit."""
    if code and started_by() is None:
        sys.exit(code)
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Ends this process with `code`, without the interpreter's shutdown.

    Torch's part of it takes a third of a second, Triton's prints what it leaked, and gloo's aborts or hangs if another
    rank is gone.
    """
    if started_by() is None:
        atexit._run_exitfuncs()  # registered by others, such as a profiler
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader is gone
            stream.flush()
    os._exit(code)


def to_catch() -> list[signal.Signals]:
    """Returns the signals that stop a run, without a SIGHUP that is ignored from the start, as with `nohup`."""
    return [one for one in SIGNALS if one.name != "SIGHUP" or signal.getsignal(one) is not signal.SIG_IGN]


def die_with_parent(parent: int) -> None:
    """Lets this process be killed when `parent` ends, even by SIGKILL, so that no rank keeps a device.

    On Linux the kernel does it; elsewhere (macOS) a thread checks the parent once a second.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform == "linux":
        import ctypes

        done = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) == 0
        if done and os.getppid() == parent:  # else the parent ended before the call
            return
    threading.Thread(target=follow, daemon=True).start()


def rank_environment(devices: int, num_nodes: int) -> dict[str, str]:
    """Returns the environment of this node's ranks, without LOCAL_RANK."""
    environment = dict(os.environ)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in environment]
    if num_nodes > 1 and missing:
        what = f"with num_nodes {num_nodes} the environment must say {', '.join(missing)}"
        hint = "on every node: MASTER_ADDR and MASTER_PORT of the first node, NODE_RANK counted from 0; or use torchrun"
        raise ConfigError(what, where="num_nodes", hint=hint)
    node_rank = env_number("NODE_RANK", 0)
    if node_rank >= num_nodes:
        what = f"NODE_RANK is {node_rank}, but with num_nodes {num_nodes} it is at most {num_nodes - 1}"
        raise ConfigError(what, where="num_nodes")
    # in a SLURM allocation without srun Fabric would take the tasks for ranks
    environment.pop("SLURM_NTASKS", None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, usable // devices)), "MASTER_ADDR": "127.0.0.1"}
    place = {"MASTER_PORT": str(env_number("MASTER_PORT", free_port())), "NODE_RANK": str(node_rank)}
    return defaults | environment | place | {"WORLD_SIZE": str(devices * num_nodes), PARENT: str(os.getpid())}


def free_port() -> int:
    """Returns a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def env_number(name: str, default: int) -> int:
    """Returns the number in an environment variable, or `default` if it is not set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a number from 0, got {text!r}", where="environment")
    return int(text)


def started_by() -> str | None:
    """Returns what started this process as a rank, or None if it is not one; in the order of Fabric's checks."""
    environment = os.environ
    ranked = "LOCAL_RANK" in environment
    if ranked and "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if ranked and PARENT in environment:
        return "litpeft"
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment and not interactive:
        return "SLURM"
    return "the environment" if ranked else None


def check_world(devices: int, num_nodes: int) -> None:
    """Raises if the number of ranks that were started is not that of the settings."""
    starter = started_by()
    if starter is None:
        return
    slurm = starter == "SLURM"
    total, each = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE") if slurm else ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    srun = f"srun --nodes={num_nodes} --ntasks-per-node={devices}"
    if slurm and env_number(total, 1) > 1 and each not in os.environ:
        what = f"SLURM started {os.environ[total]} processes without saying how many on each node"
        raise ConfigError(what, where="devices", hint=f"start them with `{srun}`, not with --ntasks")
    wanted = {total: ("devices x num_nodes", devices * num_nodes), each: ("devices", devices)}
    if slurm:
        wanted["SLURM_NNODES"] = ("num_nodes", num_nodes)
    found = {name: env_number(name, 1) for name in wanted if name in os.environ}
    pairs = [(name, have, *wanted[name]) for name, have in found.items()]
    wrong = [f"{name} is {have}, {key} {want}" for name, have, key, want in pairs if have != want]
    if not wrong:
        return
    processes, on_each = found.get(total, 1), found.get(each, found.get(total, 1))
    hint = f"say --devices {on_each} --num_nodes {max(1, processes // max(1, on_each))}, or start it with "
    if slurm:
        hint += f"`{srun}`; in a job named interactive (SLURM_JOB_NAME) litpeft starts the processes itself"
    else:
        hint += f"`torchrun --nnodes={num_nodes} --nproc_per_node={devices}`"
    what = f"{starter} started another number of processes than the settings say: {', '.join(wrong)}"
    raise ConfigError(what, where="devices", hint=hint)


def peer_lost(error: BaseException) -> bool:
    """Returns whether an error of a collective operation means that another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)
