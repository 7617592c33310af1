"""Lets one tool write greedily, and prints how fast, as JSON. Runs in the tool's own environment.

    python -m scripts.bench.writers litpeft|transformers|litgpt|llama_cpp MODEL PROMPTS.json NEW_TOKENS SETTINGS

PROMPTS.json holds rows of token ids, all of the same length, written to at once; SETTINGS is a JSON object of the
tool's own. Each tool is timed in the same way: one token after the prompt, then NEW_TOKENS of them; the difference is
decoding. The first call of each is not counted: things are made in it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[int]]
Write = Callable[[Rows, int], Rows]  # prompts and a number of new tokens -> the new tokens
TRIES = 2


def litpeft(model: str, settings: dict[str, Any], length: int) -> Write:
    from litpeft.generate.engine import answer
    from litpeft.generate.load import load_model
    from litpeft.generate.settings import Sampling

    lookup = settings.pop("lookup", 0)
    loaded = load_model(model, **settings)

    def write(prompts: Rows, new: int) -> Rows:
        sampling = Sampling(max_new_tokens=new, lookup=lookup)
        answers = answer(loaded.model, prompts, loaded.tokenizer, sampling, stop_ids=())
        return [a.ids for a in answers]

    return write


def transformers(model: str, settings: dict[str, Any], length: int) -> Write:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=settings["dtype"]).eval().to(device)
    further = {"cache_implementation": settings["cache"]} if "cache" in settings else {}
    further |= {"prompt_lookup_num_tokens": settings["lookup"]} if "lookup" in settings else {}

    def write(prompts: Rows, new: int) -> Rows:
        ids = torch.tensor(prompts, device=device)
        limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            out = loaded.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits, **further)
        return out[:, ids.size(1) :].tolist()

    return write


def litgpt(model: str, settings: dict[str, Any], length: int) -> Write:
    """As litgpt/generate/base.py's own command does it."""
    import lightning
    import litgpt.generate.base as base
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import load_checkpoint

    fabric = lightning.Fabric(devices=1, precision=settings["precision"])
    with fabric.init_module(empty_init=True):
        gpt = GPT(Config.from_file(Path(model) / "model_config.yaml"))
    with fabric.init_tensor():
        gpt.max_seq_length = length
        gpt.set_kv_cache(batch_size=1)
    gpt.eval()
    if settings.get("compile"):
        base.next_token = torch.compile(base.next_token, mode="reduce-overhead")
    gpt = fabric.setup_module(gpt)
    load_checkpoint(fabric, gpt, Path(model) / "lit_model.pth")

    def write(prompts: Rows, new: int) -> Rows:
        prompt = torch.tensor(prompts[0], device=fabric.device)
        with torch.inference_mode():
            ids = base.generate(gpt, prompt, len(prompt) + new, temperature=0.0, top_p=0.0, include_prompt=False)
        for block in gpt.transformer.h:
            block.attn.kv_cache.reset_parameters()
        return [ids.tolist()]

    return write


def llama_cpp(model: str, settings: dict[str, Any], length: int) -> Write:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
    for threads in (parameters.cpuparams, parameters.cpuparams_batch):
        threads.n_threads = int(os.environ["OMP_NUM_THREADS"])
    server = xllamacpp.Server(parameters)

    def write(prompts: Rows, new: int) -> Rows:
        asked = {"prompt": prompts[0], "n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(asked)
        if answer["timings"]["predicted_n"] != new:
            sys.exit(f"llama.cpp wrote {answer['timings']['predicted_n']} tokens instead of {new}")
        return []  # it answers with text

    return write


def shortest(work: Callable[[], Rows]) -> float:
    """Returns the shortest time of a few tries after one that is not counted, in seconds."""
    work()
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def main(tool: str, model: str, prompts: str, new_tokens: str, settings: str) -> None:
    rows, new = json.loads(Path(prompts).read_text(encoding="utf-8")), int(new_tokens)
    write = {f.__name__: f for f in (litpeft, transformers, litgpt, llama_cpp)}[tool](
        model, json.loads(settings), len(rows[0]) + new
    )
    loaded = time.time() - float(os.environ["BENCH_START"])
    first = shortest(lambda: write(rows, 1))
    whole = shortest(lambda: write(rows, new))
    figures = {
        "load_seconds": loaded,
        "prompt_per_second": len(rows) * len(rows[0]) / first,
        "decode_per_second": len(rows) * (new - 1) / (whole - first),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
