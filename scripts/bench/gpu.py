"""One measurement on a GPU in a process of its own, as a line of JSON: scripts/bench_gpu.sh runs them all.

Without a GPU it is a dry run: tiny shapes on the CPU, which show that everything starts and writes its row.

gpu.py make FOLDER --tokenizer FOLDER      random weights of Llama-3.1-8B's shapes, as a Hugging Face folder
gpu.py small FOLDER --tokenizer FOLDER     random weights of the shapes in the tokenizer folder's config.json
gpu.py train FOLDER --tool litpeft         steps of LoRA on four documents of 2,048 tokens, all of them trained
gpu.py short FOLDER --tokens 2048          steps of four passes over documents of 100 to 600 tokens
gpu.py decode FOLDER --rows 1              answers, token by token; --runs 4: rows of several runs
gpu.py table FILE                          all measurements in FILE (gpu.jsonl) as a table, with the targets
"""

import argparse
import functools
import inspect
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.attention.varlen as varlen

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
LLAMA_8B |= {"max_position_embeddings": 131072, "dtype": "bfloat16"}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "train litpeft": "1.15 of unsloth: 18,012 tokens/s; 40 GB",
    "train litpeft-nf4": "1.15 of unsloth: 17,672 tokens/s; 30 GB",
    "train litpeft-fp8": "1.3 of our bf16; held-out loss within 0.01 nats",
    "train litpeft-checkpointing": "13,000 tokens/s",
    "short small 500": "13,200 tokens/s: 4 times what it was kernel by kernel",
    "command": "8 s from the command to the first step",
    "answers bf16 1": "0.85 of the bandwidth",
    "answers bf16 16": "0.85 of the bandwidth",
    "answers nf4 1": "0.6 of the bandwidth",
    "answers nf4 16": "0.6 of the bandwidth",
    "load bf16": "8 s to the first step, imports included",
    "load bf16 cold": "1 of plain: as fast as the disk",
    "first_answer bf16": "answer after 1 s",
    "first_answer nf4": "answer after 1 s",
    "documents 8b": "0.95 of the best",
}
ROWS, LENGTH, LONGEST, STEPS, ANSWERED, BUFFER = 4, 2048, 600, 8, 40, 1 << 31
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    LLAMA_8B |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    LLAMA_8B |= {"vocab_size": 50000, "num_attention_heads": 4, "num_key_value_heads": 2}
    LENGTH, LONGEST, STEPS, ANSWERED, BUFFER = 32, 24, 3, 3, 1 << 20


def suit_older_torch() -> None:
    """Has varlen_attn of a torch before 2.13 take `enable_gqa`; its kernel shares keys between heads anyway."""
    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        given = varlen.varlen_attn

        @functools.wraps(given)
        def attend(*tensors: torch.Tensor, enable_gqa: bool = False, **options: object) -> torch.Tensor:
            return given(*tensors, **options)

        varlen.varlen_attn = attend


def make(folder: Path, tokenizer: Path, small: bool) -> None:
    """Writes random weights of Llama-3.1-8B's shapes, or of those in the tokenizer folder's config.json."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from litpeft.core.checksums import write_checksums
    from litpeft.core.safetensors import Weights

    own = small and DEVICE.type == "cuda"
    config = LlamaConfig.from_pretrained(tokenizer) if own else LlamaConfig(**LLAMA_8B)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / file)
    weights = Weights(folder)  # with its sums, as a model that `litpeft download` has fetched
    write_checksums(folder, weights.verified_sums(), "random")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], object], steps: int = STEPS) -> tuple[float, float]:
    """Returns the seconds of the first step and the median of those after the second."""
    seconds = []
    for _ in range(steps):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[0], statistics.median(seconds[2:])


def optimized(parameters: Iterable[torch.nn.Parameter], passes: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Returns a step: the passes, clipping, and AdamW."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        passes()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def on_card(row: dict[str, object]) -> dict[str, object]:
    """Returns a row with the card and the torch that it was measured with."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU, a dry run of tiny shapes"
    return {**row, "card": name, "torch": torch.__version__}


def litpeft_model(folder: Path, quantize: str | None = None, lora: bool = True):
    from litpeft.methods.lora import LoRA
    from litpeft.model.build import build
    from litpeft.model.quantize import Storage
    from litpeft.train.fused_block import use_fused_step

    storage = None if quantize is None else Storage(quantize)
    model = build(folder, torch.bfloat16, LoRA() if lora else None, DEVICE, storage)
    use_fused_step(model, DEVICE)
    return model


def batch(lengths: list[int], generator: torch.Generator):
    from litpeft.data.batches import collate
    from litpeft.data.rows import Row

    ids = [torch.randint(100, 40000, (length,), generator=generator).tolist() for length in lengths]
    return collate([Row(one, [False] + [True] * (len(one) - 1), 1, "random", []) for one in ids]).to(DEVICE)


def train(folder: Path, tool: str) -> dict[str, object]:
    """Measures peft (with liger), unsloth, unsloth-nf4, litpeft, or litpeft with -nf4, -fp8, -checkpointing, -offload.

    Fused blocks keep under `none` what they keep under `cheap`: litpeft-plain and litpeft-cheap are without them.
    """
    began, generator = time.perf_counter(), torch.Generator().manual_seed(1)
    if tool.startswith("litpeft"):
        from litpeft.model.objective import summed_loss

        model = litpeft_model(folder, next((name for name in ("nf4", "fp8") if tool.endswith(name)), None)).train()
        modes = {"checkpointing": "block", "offload": "offload", "cheap": "cheap"}
        model.recompute = modes.get(tool.rpartition("-")[2], "none")
        model.fused = None if tool.endswith(("plain", "cheap")) else model.fused
        rows = batch([LENGTH] * ROWS, generator)
        step = optimized(model.parameters(), lambda: (summed_loss(model, rows) / len(rows.at)).backward())
    else:
        model = unsloth(folder, tool.endswith("nf4")) if tool.startswith("unsloth") else peft_with_liger(folder)
        ids = torch.randint(100, 40000, (ROWS, LENGTH), generator=generator).to(DEVICE)

        def passes() -> None:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()

        step = optimized(model.parameters(), passes)
    loaded = time.perf_counter() - began
    first, median = timed(step)
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
    figures = {"tokens_per_second": round(ROWS * LENGTH / median), "peak_gb": round(peak, 1)}
    return {"row": f"train {tool}", **figures, "loaded_s": round(loaded, 1), "first_step_s": round(first, 1)}


def unsloth(folder: Path, nf4: bool) -> torch.nn.Module:
    from unsloth import FastLanguageModel

    options = {"max_seq_length": LENGTH, "dtype": torch.bfloat16, "load_in_4bit": nf4, "local_files_only": True}
    model, _ = FastLanguageModel.from_pretrained(str(folder), **options)
    options = {"r": 8, "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": LAYERS}
    model = FastLanguageModel.get_peft_model(model, **options, use_gradient_checkpointing=False)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    return model


def peft_with_liger(folder: Path) -> torch.nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    apply_liger_kernel_to_llama()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(DEVICE)
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)).train()


def short(folder: Path, tokens: int) -> dict[str, object]:
    """Measures steps of four passes of up to `tokens` tokens, as `litpeft finetune` computes them."""
    from litpeft.model.objective import summed_loss
    from litpeft.train.recorded_pass import RecordedPasses

    generator, batches = torch.Generator().manual_seed(0), []
    most = tokens if DEVICE.type == "cuda" else tokens // 32
    for _ in range(4):
        lengths: list[int] = []
        while sum(lengths) + LONGEST <= max(most, LONGEST):
            lengths.append(int(torch.randint(LONGEST // 6, LONGEST, (), generator=generator)))
        batches.append(batch(lengths, generator))
    model = litpeft_model(folder).train()
    recorded, total = RecordedPasses.of(model), sum(one.tokens for one in batches)

    def passes() -> None:
        for one in batches:
            if recorded is None or recorded(one, 1 / total) is None:
                (summed_loss(model, one) / total).backward()

    _, median = timed(optimized(model.parameters(), passes))
    sizes = [one.tokens for one in batches]
    return {"row": f"short {folder.name} {tokens}", "tokens": sizes, "tokens_per_second": round(total / median)}


def decode(folder: Path, rows: int, quantize: str | None, runs: int) -> dict[str, object]:
    """Measures tokens of answers to prompts of 64 tokens, and the share of the time that reading the weights takes.

    With `runs` the rows have the base and so many runs of LoRA by turns.
    """
    from litpeft.generate.cache import TokenCache
    from litpeft.generate.gpu.fused_block import fuse_blocks

    model = litpeft_model(folder, quantize, lora=False).eval().requires_grad_(False)
    if runs:
        add_runs(model, runs)
    if DEVICE.type == "cuda":
        fuse_blocks(model)
    cache, ids = TokenCache(model), [list(range(5, 69)) for _ in range(rows)]
    cache.adapters = [row % (runs + 1) for row in range(rows)] if runs else []

    def step() -> None:
        cache.logits(ids)
        for one in ids:
            one.append(7)

    _, median = timed(step, ANSWERED)
    read = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    source, target = (torch.empty(BUFFER, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    _, copying = timed(lambda: target.copy_(source))
    rate, copied = read / median / 1e12, 2 * source.nbytes / copying / 1e12
    figures = {"tokens_per_second": round(rows / median, 1), "weights_tb_per_s": round(rate, 2)}
    row = f"answers {quantize or 'bf16'} {rows}" + (f" of {runs} runs" if runs else "")
    return {"row": row, **figures, "copy_tb_per_s": round(copied, 2), "of_the_bandwidth": round(rate / copied, 2)}


def add_runs(model: torch.nn.Module, number: int) -> None:
    """Puts runs of LoRA of rank 8 with random numbers beside the linear layers of the blocks."""
    from litpeft.model.affine import Affine
    from litpeft.model.by_row import add_by_row
    from litpeft.model.delta import linears

    layers, like = linears(model, ("*.attn.*", "*.mlp.*")), {"dtype": model.dtype, "device": DEVICE}

    def update(layer: torch.nn.Linear) -> Affine:
        inputs, outputs = layer.in_features, layer.out_features
        return Affine(A=torch.randn(8, inputs, **like) / inputs, B=torch.randn(outputs, 8, **like))

    add_by_row(model, [{name: update(layer) for name, layer in layers.items()} for _ in range(number)])


def table(rows: list[dict[str, object]]) -> str:
    """Returns the rows in Markdown, the newest of each name, beside their targets; a row may have `failed`."""
    newest = {str(row["row"]): row for row in rows}
    cards = sorted({f"{row['card']}, torch {row['torch']}" for row in newest.values() if "card" in row})
    lines = ["; ".join(cards), "", "| | tokens/s | peak memory, GB | other figures | target |", "|---" * 5 + "|"]
    for name, row in newest.items():
        shown = [f"{row[key]:,}" if key in row else "" for key in ("tokens_per_second", "peak_gb")]
        known = ("row", "tokens_per_second", "peak_gb", "card", "torch")
        others = "; ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        lines.append(f"| {name} | {' | '.join(shown)} | {others} | {TARGETS.get(name, '')} |")
    return "\n".join(lines)


def main() -> None:
    suit_older_torch()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "small", "train", "short", "decode", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tool", default="litpeft")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--quantize")
    parser.add_argument("--runs", type=int, default=0)
    given = parser.parse_args()
    if given.what == "table":
        print(table([json.loads(line) for line in given.folder.read_text(encoding="utf-8").splitlines()]))
        return
    if given.what in ("make", "small"):
        make(given.folder, given.tokenizer, given.what == "small")
        return
    actions = {
        "train": lambda: train(given.folder, given.tool),
        "short": lambda: short(given.folder, given.tokens),
        "decode": lambda: decode(given.folder, given.rows, given.quantize, given.runs),
    }
    print(json.dumps(on_card(actions[given.what]())), flush=True)


if __name__ == "__main__":
    main()
