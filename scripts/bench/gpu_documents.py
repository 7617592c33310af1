"""`litpeft finetune lora` on documents of 100 to 600 tokens, with train.micro_tokens auto and set by hand.

A row of scripts/bench_gpu.sh, written again after each run, so that a limit of time leaves what was measured.
Without a GPU it is a dry run of tiny documents.

gpu_documents.py FOLDER
"""

import contextlib
import csv
import gc
import json
import random
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from scripts.bench.gpu import DEVICE, LONGEST, on_card, suit_older_torch

ROWS, STEPS = (64, 6) if DEVICE.type == "cuda" else (8, 3)  # of a step; of a run
BY_HAND = (8192, 4096, 2048, 16384) if DEVICE.type == "cuda" else (64,)  # the last may not fit
WORD = re.compile("[a-z]{3,}")


def write_documents(folder: Path, file: Path) -> None:
    """Writes random words, each a token of the folder's tokenizer: as many rows as the steps need."""
    from litpeft.data.tokenizer import Tokenizer

    draw, names = random.Random(0), Tokenizer.load(folder).backend.names.values()
    words = [name[1:] for name in names if name[:1] in ("Ġ", "▁") and WORD.fullmatch(name[1:])]
    lengths = [draw.randint(LONGEST // 6, LONGEST) for _ in range(ROWS * STEPS)]
    texts = (" ".join(draw.choices(words or ["of", "the"], k=length)) for length in lengths)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def trained(folder: Path, rows: Path, out: Path, micro_tokens: int | str) -> tuple[int, int]:
    """Returns the tokens of a pass that a run took, and its tokens/s: the median of the steps after the second."""
    from litpeft.cli import main as litpeft

    options = {"base.dir": folder, "data.path": rows, "out": out, "train.micro_tokens": micro_tokens}
    options |= {"overwrite": "true", "check_rows": "false", "data.cache": "false", "data.validation_split": 0}
    options |= {"train.batch_size": ROWS, "train.max_steps": STEPS, "checkpoint.interval": 0}
    options |= {"ending.rows": 0, "ending.neutral": "none"}
    litpeft(["finetune", "lora", *(word for key, value in options.items() for word in (f"--{key}", str(value)))])
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    taken = re.search(r"^ *micro_tokens: (\d+)$", (out / "run.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    with open(out / "metrics.csv", encoding="utf-8") as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    return int(taken[1]), round(statistics.median(rates[2:]))


def main(folder: Path) -> None:
    suit_older_torch()
    rates: dict[str, int | str] = {}
    with tempfile.TemporaryDirectory() as place:
        rows, chosen, best = Path(place) / "rows.jsonl", 0, 0
        write_documents(folder, rows)
        for given in ("auto", *BY_HAND):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    taken, rate = trained(folder, rows, Path(place) / "run", given)
            except SystemExit as stop:  # the command has said why
                if given == "auto":
                    raise
                rates[str(given)] = f"exit code {stop.code}"
                continue
            if given == "auto":
                chosen, auto = taken, rate
            else:
                rates[str(given)] = rate
            best = max(best, rate)
            figures = {"tokens_per_second": auto, "of_the_best": round(auto / best, 3), "auto": chosen}
            print(json.dumps(on_card({"row": f"documents {folder.name}", **figures, "by_hand": rates})), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
