"""Runs a command as a process of its own and measures it, and makes figures of what its observer noted."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path("out/bench")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


@dataclass
class Finished:
    """What a process cost, as the kernel counted it; the time is its children's too."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int  # the highest resident memory of the process itself


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Finished:
    """Runs a command to its end, with its output in `log`; it is told when it was started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    told = os.environ | (environment or {}) | {"BENCH_START": repr(began)}
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=told)
        try:
            ended, peak = 0, 0
            while not ended:
                peak = max(peak, peak_memory(process.pid))
                time.sleep(0.05)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        except KeyboardInterrupt:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)  # so that subprocess knows that it was waited for
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(process.returncode, time.time() - began, cpu, peak or usage.ru_maxrss * RSS_UNIT)


def printed(log: Path) -> dict[str, Any]:
    """Returns the last JSON object among the lines that a process printed; libraries print around it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def peak_memory(pid: int | str) -> int:
    """Returns the highest resident memory of a process that runs, in bytes; 0 where that cannot be asked.

    ru_maxrss would not do alone: on Linux it begins with the memory of the process that started this one.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such system, or no such process any more
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def find_rows(ids: list[int], rows: list[list[int]]) -> list[int]:
    """Returns the numbers of the rows that a sequence holds one after the other; what follows the last is padding.

    Of rows that begin alike the longest is taken: the shorter might be its beginning.
    """
    found, at = [], 0
    while at < len(ids):
        hits = [i for i, row in enumerate(rows) if ids[at : at + len(row)] == row]
        if not hits:
            break
        found.append(max(hits, key=lambda i: len(rows[i])))
        at += len(rows[found[-1]])
    return found


def training_figures(record: dict[str, Any], rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Returns the figures of a run; rates are those of the steps after the first, in which things are still made.

    `rows` are what it was given, as {ids, trained}. A computed position that belongs to none of them is padding.
    """
    steps, first = record["steps"], record["steps"][0]
    known = [row["ids"] for row in rows]
    seen = [(made["step"], len(ids), find_rows(ids, known)) for made in record["passes"] for ids in made["ids"]]
    if len(steps) < 2 or not all(found for _, _, found in seen):
        what = "only one step" if len(steps) < 2 else "it read other tokens than those of the rows"
        raise ValueError(f"{what}: there is no rate to tell")
    later = [i for step, _, found in seen if 0 < step < len(steps) for i in found]
    every = [i for step, _, found in seen for i in found]
    real, trained = sum(len(known[i]) for i in later), sum(sum(rows[i]["trained"]) for i in later)
    seconds, cpu = steps[-1]["time"] - first["time"], steps[-1]["cpu_seconds"] - first["cpu_seconds"]
    return {
        "real_per_second": real / seconds,
        "trained_per_second": trained / seconds,
        "cpu_seconds_per_1000": 1000 * cpu / real,
        "peak_bytes": steps[-1]["peak_bytes"],
        "first_step_seconds": record["first_forward"] - record["started"],
        "computed": sum(length for _, length, _ in seen),
        "real": sum(len(known[i]) for i in every),
        "trained": sum(sum(rows[i]["trained"]) for i in every),
        "rows": len(every),
        "steps": len(steps),
        "measured_lengths": [len(known[i]) for i in later],
        "measured_trained": trained,
        "measured_seconds": seconds,
        "threads": record["threads"],
    }


def quiet(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of every process that is measured."""
    environment = {"BENCH_DEVICE": args.device, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})


def measure_roof(args: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Returns what the machine can do now: see roof.py."""
    log = OUT / "logs" / "roof.json"
    done = run([sys.executable, "-m", "scripts.bench.roof", str(args.model), args.device], log, environment)
    if done.code:
        sys.exit(f"the roof cannot be measured: see {log}")
    return printed(log)


def machine() -> dict[str, Any]:
    """Returns what is known of the machine without asking for rights."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
    }
