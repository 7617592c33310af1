"""Answers for several runs at once: `litpeft serve`, beside peft's batches of several adapters.

    python -m scripts.bench.serve checkpoints/SmolLM2-135M-Instruct out/a out/b out/c --clients 16 --requests 32

needs litpeft with its test extras. Requests take the base and the runs by turns; a client sends its next one as soon
as it has the answer. With `--held N` the runs are in one folder, and so many of them in memory at once. Each round
measures the base alone, the first run alone, and all together, and then peft with the
adapters that the runs hold, in batches of as many rows, in this process.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.bench.generate import TEXT, THINGS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held", type=int, help="runs in memory at once; all, if left out")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    prompts = [f"{number}. {TEXT.format(THINGS[number % len(THINGS)])}" for number in range(args.requests)]
    names = [args.base.name, *(run.name for run in args.runs)]
    for turn in range(args.rounds):
        with Served(args) as server:
            for models in ([names[0]], [names[1]], names):
                tokens, seconds = server.answers(prompts, models, args)
                print(
                    f"round {turn + 1}: litpeft serve, {', '.join(models)}: {tokens / seconds:.1f} tokens/s", flush=True
                )
        tokens, seconds = with_peft(prompts, args)
        print(f"round {turn + 1}: peft, all of them: {tokens / seconds:.1f} tokens/s", flush=True)


class Served:
    """A server process, ended at the end of the block."""

    def __init__(self, args: argparse.Namespace):
        first, *others = map(str, args.runs)
        models = [first, "--also", json.dumps(others)]
        if args.held is not None:
            models = [str(args.base), "--runs", str(args.runs[0].parent), "--runs_held", str(args.held)]
        command = [sys.executable, "-m", "litpeft", "serve", *models, "--port", "0", "--batch_size", str(args.clients)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Served":
        line = next(line for line in self.process.stderr if "/v1 answers" in line)
        self.url = line.split(" ")[0]
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def answers(self, prompts: list[str], models: list[str], args: argparse.Namespace) -> tuple[int, float]:
        """Returns how many tokens were written, and in what time; a first answer of each model is not measured."""

        def ask(number: int) -> int:
            messages = [{"role": "user", "content": prompts[number]}]
            body = {"model": models[number % len(models)], "messages": messages, "temperature": 0}
            text = json.dumps(body | {"max_tokens": args.new_tokens}).encode()
            request = urllib.request.Request(f"{self.url}/chat/completions", text, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)["usage"]["completion_tokens"]

        with ThreadPoolExecutor(args.clients) as pool:
            list(pool.map(ask, range(len(models))))  # their beginning, the system message, is in memory from now on
            began = time.perf_counter()
            tokens = sum(pool.map(ask, range(len(prompts))))
            return tokens, time.perf_counter() - began


def with_peft(prompts: list[str], args: argparse.Namespace) -> tuple[int, float]:
    """Returns the same for peft: a batch is answered to its end before the next one begins."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, args.runs[0] / "final", adapter_name=args.runs[0].name)
    for run in args.runs[1:]:
        model.load_adapter(run / "final", adapter_name=run.name)
    model.eval()
    names = ["__base__", *(run.name for run in args.runs)]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    tokens, began = 0, time.perf_counter()
    for start in range(0, len(texts), args.clients):
        part = texts[start : start + args.clients]
        batch = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
        adapters = [names[(start + number) % len(names)] for number in range(len(part))]
        with torch.inference_mode():
            out = model.generate(**batch, adapter_names=adapters, max_new_tokens=args.new_tokens, do_sample=False)
        new = out[:, batch["input_ids"].size(1) :]
        tokens += sum(
            row.tolist().index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row) for row in new
        )
    return tokens, time.perf_counter() - began


if __name__ == "__main__":
    main()
