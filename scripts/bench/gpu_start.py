"""What comes before the first step and the first answer on a GPU: rows of scripts/bench_gpu.sh, each a process.

Imports are late: their seconds are measured, from BEGAN, the time at which the process was started. Without a GPU it is
a dry run.

gpu_start.py load FOLDER [--quantize nf4] [--cold]      imports, CUDA's start, the model without weights, its weights
gpu_start.py first_answer FOLDER [--quantize nf4]       from the end of loading to the answer of `litpeft generate`
gpu_start.py command ARGUMENTS                          `litpeft ARGUMENTS`, to its first optimizer step
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

BEGAN = float(os.environ.get("BEGAN", time.time()))
PROMPT, ANSWERED, CHUNK = "Name three colours, and say what each of them stands for.", 64, 1 << 23


class Watch:
    """Seconds that calls of functions take, by the functions' names, until the device has done them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, float] = {}  # when the first call of each was done

    def on(self, owner: object, name: str) -> None:
        """Watches a function of a module or class from now on."""
        given = getattr(owner, name)

        def watched(*args: object, **named: object) -> object:
            result, self.seconds[name] = clocked(lambda: given(*args, **named), self.seconds.get(name, 0.0))
            self.ends.setdefault(name, time.perf_counter())
            return result

        setattr(owner, name, watched)


def clocked(call: Callable[[], object], before: float = 0.0) -> tuple[object, float]:
    """Returns the result of a call, and `before` with the seconds until the device has done it."""
    from scripts.bench.gpu import synchronize

    began = time.perf_counter()
    result = call()
    synchronize()
    return result, before + time.perf_counter() - began


def load(folder: Path, quantize: str | None, cold: bool) -> dict[str, object]:
    """Measures how `litpeft finetune lora` comes to its model; then reading and checksums, each by itself.

    GB/s are those of the weights' files: `weights` while the model is built, beside the checksums; `plain` into host
    memory, with as many threads; `read` onto the device; `sums` of the checksums. `cold`: from the disk each time.
    """
    from litpeft.core.early_sums import begin_folders

    def fresh() -> None:
        if cold:
            drop_pages(folder)

    fresh()
    begin_folders([folder])
    import litpeft.train.finetune  # noqa: F401

    figures: dict[str, object] = {"imports_s": round(time.time() - BEGAN, 1)}
    began = time.perf_counter()  # the command does this once its rows are read
    import litpeft.train.fabric  # noqa: F401

    figures["fabric_s"] = round(time.perf_counter() - began, 1)
    gc.enable()

    import torch

    from litpeft.core.checksums import _sums
    from litpeft.core.safetensors import Weights
    from litpeft.core.to_device import on_device
    from litpeft.model import build
    from scripts.bench.gpu import DEVICE, litpeft_model

    def read_all() -> None:
        with on_device(weights, weights.file_of, DEVICE) as files:
            for name in weights.file_of:
                files.read(name).to(DEVICE, copy=DEVICE.type == "cpu")

    _, seconds = clocked(lambda: torch.ones(1, device=DEVICE) + 1)
    figures["cuda_s"] = round(seconds, 2)
    watch = Watch()
    watch.on(build, "_fill")
    watch.on(Weights, "verified_sums")
    model, seconds = clocked(lambda: litpeft_model(folder, quantize))
    seconds += clocked(model.files.fingerprint)[1]
    read, waited = watch.seconds["_fill"], watch.seconds["verified_sums"]
    figures |= {"model_s": round(seconds - read - waited, 2), "weights_s": round(read, 2)}
    figures["wait_for_sums_s"] = round(waited, 2)
    del model
    gc.collect()
    weights = Weights(folder)
    size = sum((folder / file).stat().st_size for file in weights.headers) / 1e9
    alone: dict[str, float] = {}
    for name, call in ("plain", lambda: read_plainly(folder)), ("read", read_all), ("sums", weights.verified_sums):
        fresh()
        _sums.cache_clear()
        alone[name] = clocked(call)[1]
        figures[f"{name}_gb_per_s"] = round(size / alone[name], 2)
    figures |= {"weights_gb_per_s": round(size / read, 2), "of_plain": round(alone["plain"] / read, 2)}
    return {"row": f"load {quantize or 'bf16'}{' cold' if cold else ''}", "gb": round(size, 2), **figures}


def drop_pages(folder: Path) -> None:
    """Drops the weights' files from the page cache, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> None:
    """Reads the weights' files from one end to the other, with as many threads as a model is read with."""
    from litpeft.core.to_device import THREADS

    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(THREADS):
        buffers.put(memoryview(bytearray(CHUNK)))

    def read(part: tuple[Path, int]) -> None:
        buffer = buffers.get()
        with open(part[0], "rb", buffering=0) as file:
            os.preadv(file.fileno(), [buffer], part[1])
        buffers.put(buffer)

    paths = sorted(folder.glob("*.safetensors"))
    parts = [(path, start) for path in paths for start in range(0, path.stat().st_size, CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, parts))


def first_answer(folder: Path, quantize: str | None) -> dict[str, object]:
    """Measures the command `litpeft generate`, the default settings but for a fixed number of tokens."""
    from litpeft.cli import main as litpeft
    from litpeft.generate import engine

    watch = Watch()
    for owner, name in (engine, "load_one"), (engine.Draft, "add"), (engine, "respond"):
        watch.on(owner, name)
    words = ["generate", str(folder), "--prompt", PROMPT, "--sampling.max_new_tokens", str(ANSWERED)]
    began = time.time() - time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        litpeft([*words, *(["--quantize", quantize] if quantize else [])])
    loaded, first, done = (watch.ends[name] for name in ("load_one", "add", "respond"))
    figures = {"first_token_s": round(first - loaded, 2), "answer_s": round(done - loaded, 2), "tokens": ANSWERED}
    whole = {"load_s": round(watch.seconds["load_one"], 1), "from_the_command_s": round(began + done - BEGAN, 1)}
    return {"row": f"first_answer {quantize or 'bf16'}", **figures, **whole}


def command(words: list[str]) -> dict[str, object]:
    """Measures `litpeft WORDS`, a command that trains, up to the log's line of its first step and to its end."""
    from litpeft.cli import main as litpeft
    from litpeft.train.log import Log
    from scripts.bench.gpu import suit_older_torch

    suit_older_torch()
    watch = Watch()
    watch.on(Log, "step")  # not the optimizer's: it is tried before there is a model
    began = time.time() - time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        litpeft(words)
    first, done = began + watch.ends["step"] - BEGAN, time.time() - BEGAN
    return {"row": "command", "first_step_s": round(first, 1), "in_all_s": round(done, 1)}


def main() -> None:
    gc.disable()  # as litpeft/__main__.py does until the command's modules are imported
    if sys.argv[1] == "command":
        print(json.dumps(command(sys.argv[2:])), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "first_answer"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize")
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    cold, quantize = given.cold, given.quantize
    row = load(given.folder, quantize, cold) if given.what == "load" else first_answer(given.folder, quantize)
    from scripts.bench.gpu import on_card

    print(json.dumps(on_card(row)), flush=True)


if __name__ == "__main__":
    main()
