"""Runs a finetuning command and notes, from outside its code, what it computed and when: the same for every tool.

    python -m scripts.bench.observe RECORD.json litpeft|litgpt|trl ARGUMENT...

RECORD.json gets when the first training forward pass began, the token ids of each, and for each optimiser step its
time, the process's CPU time and its highest resident memory so far. The environment says when the process was started
(BENCH_START, in seconds since the epoch) and on which device it runs (BENCH_DEVICE).
"""

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from scripts.bench.measure import RSS_UNIT, peak_memory


class Observer:
    """Looks on at the two places that every training loop passes: the embedding, and the optimiser's step."""

    def __init__(self) -> None:
        self.cuda = os.environ.get("BENCH_DEVICE") == "cuda"
        self.first: float | None = None
        self.passes: list[tuple[int, Tensor]] = []  # the step it belongs to, and the ids (B, T)
        self.steps: list[dict[str, float]] = []

    def watch(self) -> None:
        embedding = F.embedding

        def seen(ids: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
            if torch.is_grad_enabled() and not ids.is_floating_point() and weight.size(0) > 1000:
                if self.first is None:
                    self.first = time.time()
                self.passes.append((len(self.steps), ids.detach().clone()))
            return embedding(ids, weight, *rest, **options)

        F.embedding = seen
        register_optimizer_step_post_hook(self.step)

    def step(self, *_: object) -> None:
        if self.first is None:
            return  # a trial of the optimizer, before there is anything to train on
        if self.cuda:
            torch.cuda.synchronize()  # else the time is that of the queue
        usage = resource.getrusage(resource.RUSAGE_SELF)
        resident = peak_memory("self") or usage.ru_maxrss * RSS_UNIT
        self.steps.append(
            {
                "time": time.time(),
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else resident,
            }
        )

    def write(self, path: Path) -> None:
        record = {
            "started": float(os.environ["BENCH_START"]),
            "first_forward": self.first,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "steps": self.steps,
            "passes": [{"step": step, "ids": ids.tolist()} for step, ids in self.passes],
        }
        path.write_text(json.dumps(record), encoding="utf-8")


def main(record: str, tool: str, *arguments: str) -> None:
    observer = Observer()
    observer.watch()
    sys.argv = [tool, *arguments]
    if tool == "litpeft":
        from litpeft.cli import main as command
    elif tool == "litgpt":
        from litgpt.__main__ import main as command
    else:

        def command() -> None:
            runpy.run_module("scripts.bench.peer_trl", run_name="__main__", alter_sys=True)

    command()
    observer.write(Path(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
