"""Starts the processes of a run on several devices, and ends them properly.

With more than one device `litpeft finetune` becomes a parent that only watches. It starts the command again for each
device, as a rank of torch.distributed, passes signals on, and returns one exit code for all. torchrun or SLURM may
start the ranks instead. Nothing heavy is imported here: the parent holds no model and no device.
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

PARENT = "LITPEFT_LAUNCHER"  # in a rank that `launch` started: the process id of its parent
GRACE = 10.0  # seconds in which the other ranks may end by themselves after one ended badly
PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL
POLL = 0.1  # seconds between two looks at the ranks
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# What a RuntimeError says when a rank is gone; gloo has no class of its own for it. Seen with torch 2.13 when a rank
# was killed, stopped or raised; the last five are known from reports.
LOST = (
    "Connection closed by peer",  # gloo: it ended
    "Timed out waiting",  # gloo: it stands still
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
    """Runs `command` (default: this program) with `argv` once a device; returns the exit code when all have ended.

    Returns None in a process that is a rank already, whoever started it: the caller goes on with its work.
    """
    if started_by() is not None:
        if PARENT in os.environ:
            end_with(int(os.environ[PARENT]))
        return None
    environment = rank_environment(devices, num_nodes)
    command = [*(command or (sys.executable, "-m", "litpeft")), *argv]
    asked: list[int] = []  # signals to pass on; only noted here, so that nothing is sent in the midst of a start
    caught = [number for number in SIGNALS if signal.Signals(number).name != "SIGHUP" or not is_ignored(number)]
    before = {number: signal.signal(number, lambda n, frame: asked.append(n)) for number in caught}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank in range(devices):
            own = environment | {"LOCAL_RANK": str(local_rank)}
            # in a session of its own a rank gets the terminal's Ctrl-C once, from us, and cannot read the terminal
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
    """Passes signals on until all ranks have ended, and returns the exit code of the run.

    `first` is the global number of ranks[0]; `asked` is where signals to this process are noted.
    """
    passed_on: set[int] = set()
    bad: dict[int, int] = {}  # global rank -> return code of those that ended badly by themselves, in that order
    due, means = float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while True:
        codes = {first + number: rank.poll() for number, rank in enumerate(ranks)}
        running = [rank for rank in ranks if rank.returncode is None]
        forced = len(means) < 2  # who ends now ends because of us
        for number, code in codes.items():
            if code and number not in bad and not forced:
                bad[number] = code
                if code < 0 and -code not in passed_on:
                    tell_killed(number, -code)
                # after an agreed stop the others may still be saving: they get all the time that they need
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
    """Returns the code of the run: that of the first rank that ended badly for a reason of its own.

    PEER_LOST is no such reason: it tells that another rank is gone, which may still be on its way out. Nor is an abort:
    gloo's threads and NCCL's watchdog abort a process that lost another.
    """
    own = [code for code in bad if code not in (PEER_LOST, -signal.SIGABRT)]
    cause = own[0] if own else PEER_LOST if bad else 0
    if cause >= 0:
        return cause
    # a signal that came before the rank could handle it is told as a shell tells it
    return 128 - cause if -cause in passed_on else PEER_LOST


def tell_killed(number: int, by: int) -> None:
    """Prints that a rank was killed by a signal that did not come through this process."""
    hint = "the kernel does this when memory runs out; `dmesg` tells" if by == signal.SIGKILL else ""
    error = ResourceError(f"rank {number} was killed by {signal.Signals(by).name}", hint=hint)
    tell(f"litpeft: {error}")


def leave(code: int) -> NoReturn:
    """Ends a command with `code`: a rank at once, another process where its caller ends it."""
    if code and started_by() is None:
        sys.exit(code)
    end(code)


def end(code: int) -> NoReturn:
    """Ends this process with `code`, without the interpreter's teardown.

    That of torch takes a third of a second, and Triton's lists what it left behind; once another rank has left, gloo
    aborts or hangs in it.
    """
    if started_by() is None:
        atexit._run_exitfuncs()  # what others have asked for: a profiler's report
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader has left: nobody to tell
            stream.flush()
    os._exit(code)


def is_ignored(number: int) -> bool:
    """Returns whether this process was started to ignore a signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def end_with(parent: int) -> None:
    """Lets this process be killed when `parent` is, even by SIGKILL: no rank may stay behind on a device.

    Linux's kernel does it. Elsewhere (macOS) a thread looks once a second whose child this process is.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform == "linux":
        import ctypes

        done = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) == 0
        if done and os.getppid() == parent:  # else it died before the kernel was told
            return
    threading.Thread(target=follow, daemon=True).start()


def rank_environment(devices: int, num_nodes: int) -> dict[str, str]:
    """Returns the environment of this node's ranks, all but LOCAL_RANK."""
    environment = dict(os.environ)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in environment]
    if num_nodes > 1 and missing:
        what = f"with num_nodes {num_nodes} the environment must say {', '.join(missing)}"
        hint = "on every node: MASTER_ADDR and MASTER_PORT of the first node, NODE_RANK counted from 0; or use torchrun"
        raise ConfigError(what, where="num_nodes", hint=hint)
    node_rank = number_in("NODE_RANK", 0)
    if node_rank >= num_nodes:
        what = f"NODE_RANK is {node_rank}, but with num_nodes {num_nodes} it is at most {num_nodes - 1}"
        raise ConfigError(what, where="num_nodes")
    # an allocation of SLURM without srun: its tasks are not our ranks, and Fabric would take them for such
    environment.pop("SLURM_NTASKS", None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, usable // devices)),
        "MASTER_ADDR": "127.0.0.1",
        **environment,
        "MASTER_PORT": str(number_in("MASTER_PORT", free_port())),
        "NODE_RANK": str(node_rank),
        "WORLD_SIZE": str(devices * num_nodes),
        PARENT: str(os.getpid()),
    }


def free_port() -> int:
    """Returns a TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def number_in(name: str, default: int) -> int:
    """Returns the number that an environment variable holds, or `default` where it is not set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a number from 0, got {text!r}", where="environment")
    return int(text)


def started_by() -> str | None:
    """Returns who started this process as a rank, or None if nobody did; the order is the one of Fabric."""
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
    """Raises if those who started the ranks started another number of them than the settings say."""
    starter = started_by()
    if starter is None:
        return
    slurm = starter == "SLURM"
    total, each = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE") if slurm else ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    srun = f"srun --nodes={num_nodes} --ntasks-per-node={devices}"
    if slurm and number_in(total, 1) > 1 and each not in os.environ:
        what = f"SLURM started {os.environ[total]} processes without saying how many on each node"
        raise ConfigError(what, where="devices", hint=f"start them with `{srun}`, not with --ntasks")
    wanted = {total: ("devices x num_nodes", devices * num_nodes), each: ("devices", devices)}
    if slurm:
        wanted["SLURM_NNODES"] = ("num_nodes", num_nodes)
    found = {name: number_in(name, 1) for name in wanted if name in os.environ}
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
    """Returns whether an exception of a collective operation says that another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)
