"""Training, side by side: runs every tool in turn, several rounds, each run a process of its own.

Called by scripts/bench_train.sh, which makes the environments; `--help` lists the options.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench.commands import PYTHON, ROWS_A_STEP, Job, Variant, choose, command, litgpt_copy, loss_arguments
from scripts.bench.measure import OUT, machine, measure_roof, printed, quiet, run, training_figures
from scripts.bench.shapes import Shapes, step_flops
from scripts.bench.tables import MERGING, TRAINING, Round, table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_train.sh", description=__doc__)
    parser.add_argument("data", type=Path, help="alpaca rows: .json or .jsonl")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/SmolLM2-135M-Instruct"), help="a Llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=64, help="rows to measure the loss on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer rows are left out")
    parser.add_argument("--tools", default="litpeft,litgpt,trl")
    parser.add_argument("--what", default="lora", help="lora, qlora, full: one or several, with commas")
    parser.add_argument(
        "--variants", default="", help="only these, e.g. 'litpeft,litgpt mb1'; see scripts/bench/commands.py"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--no-merge", action="store_true", help="leave out litpeft merge and Lit-GPT's merge_lora")
    parser.add_argument("--no-loss", action="store_true", help="leave out the held-out loss, which is in float32")
    args = parser.parse_args()
    if args.rows % ROWS_A_STEP or min(args.rows, args.rounds, args.epochs, args.held_out) < 1:
        parser.error(f"--rows must be a multiple of {ROWS_A_STEP}, and all counts at least 1")
    return args


def main() -> None:
    args = arguments()
    tools = [tool for tool in args.tools.split(",") if tool == "litpeft" or Path(f".bench/{tool}/ready").exists()]
    missing = sorted(set(args.tools.split(",")) - set(tools))
    variants = choose(args.what.split(","), tools, list(filter(None, args.variants.split(","))), args.device)
    if not variants:
        sys.exit("nothing to run: see --tools, --what and --variants")
    rows = OUT / "rows"
    prepare = [
        sys.executable,
        "-m",
        "scripts.bench.rows",
        args.data,
        args.model,
        rows,
        args.rows,
        args.held_out,
        args.max_length,
    ]
    subprocess.run(list(map(str, prepare)), check=True)
    tokens = json.loads((rows / "tokens.json").read_text(encoding="utf-8"))["train"]
    environment = quiet(args)
    base = [args.model, rows / "tokens.json", "base", args.model]
    args.base_loss = None if args.no_loss else held_out_loss(base, "base", environment)
    results: dict[str, list[Round]] = {}
    merges: dict[str, list[Round]] = {}
    roofs: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        roofs.append(measure_roof(args, environment))
        for variant in variants:
            job = make_job(args, variant, rows, tokens, turn)
            figures = one_run(variant, job, tokens, environment, roofs[-1])
            if "failed" not in figures and not args.no_loss:
                name = f"{variant.what} {variant.name}"
                figures["loss"] = held_out_loss(loss_arguments(variant, job), name, environment)
            results.setdefault(f"{variant.what}: {variant.name}", []).append(figures)
            merged = None if args.no_merge or "failed" in figures else merge(variant, job, environment)
            if merged is not None:
                merges.setdefault(f"merge: {variant.tool}", []).append(merged)
            write(args, results, merges, roofs, variants, missing)
    print(f"\n{report(args, results, merges, roofs, variants, missing)}")


def held_out_loss(words: list[object], name: str, environment: dict[str, str]) -> float | None:
    """Returns the loss that losses.py finds; None if it fails, which its log explains."""
    log = OUT / "logs" / f"{name}-loss.json".replace(" ", "-")
    done = run([sys.executable, "-m", "scripts.bench.losses", *map(str, words)], log, environment)
    return None if done.code else printed(log)["loss"]


def make_job(args: argparse.Namespace, variant: Variant, rows: Path, tokens: list[dict], turn: int) -> Job:
    """Returns what a variant is asked in a round; the seed is the round's number."""
    return Job(
        model=args.model,
        rows=rows,
        out=OUT / "runs" / f"{variant.what} {variant.name}".replace(" ", "-"),
        epochs=args.epochs,
        lr=args.lr if variant.what != "full" else args.lr / 10,
        max_length=args.max_length,
        steps=args.rows * args.epochs // ROWS_A_STEP,
        tokens=sum(len(row["ids"]) for row in tokens),
        seed=turn,
        device=args.device,
    )


def one_run(variant: Variant, job: Job, tokens: list[dict], environment: dict[str, str], roof: dict[str, Any]) -> Round:
    """Trains once and returns the figures, or what went wrong."""
    name = f"{variant.what} {variant.name}"
    log, record = OUT / "logs" / f"{name}.log".replace(" ", "-"), job.out / "record.json"
    shutil.rmtree(job.out, ignore_errors=True)  # of an earlier round: Lit-GPT would not merge again
    words = command(variant, job, record)
    done = run(words, log, environment)
    if done.code or not record.exists():
        print(f"round {job.seed + 1}: {name}: failed, see {log}", file=sys.stderr)
        return {"failed": f"exit code {done.code}, see {log}"}
    try:
        figures: Round = training_figures(json.loads(record.read_text(encoding="utf-8")), tokens)
    except ValueError as error:
        return {"failed": f"{error}, see {log}"}
    needed = step_flops(Shapes.read(job.model), figures["measured_lengths"], figures["measured_trained"], variant.what)
    figures["roof_share"] = needed / figures["measured_seconds"] / roof["flops_per_second"]
    figures |= {
        "process_seconds": done.seconds,
        "process_cpu_seconds": done.cpu_seconds,
        "process_peak": done.peak_bytes,
    }
    figures["command"] = words
    shown = f"{figures['real_per_second']:.0f} real tokens/s, {100 * figures['roof_share']:.0f} % of the roof"
    print(f"round {job.seed + 1}: {name}: {shown}", file=sys.stderr, flush=True)
    return figures


def merge(variant: Variant, job: Job, environment: dict[str, str]) -> Round | None:
    """Folds a plain LoRA run into its base, as the tool does it; None for other runs. TRL has no command for it."""
    if (variant.what, variant.name) not in (("lora", "litpeft"), ("lora", "litgpt")):
        return None
    log, run_folder = OUT / "logs" / f"merge-{variant.tool}.log", job.out / "run"
    if variant.tool == "litpeft":
        words = [str(PYTHON["litpeft"]), "-m", "litpeft", "merge", str(run_folder), "--overwrite"]
    else:
        (run_folder / "final" / "lit_model.pth").unlink()  # finetune_lora has merged once already
        base = ["--pretrained_checkpoint_dir", str(litgpt_copy(job.model))]
        words = [str(PYTHON["litgpt"].with_name("litgpt")), "merge_lora", str(run_folder / "final"), *base]
    done = run(words, log, environment)
    if done.code:
        return {"failed": f"exit code {done.code}, see {log}"}
    return {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "peak_bytes": done.peak_bytes}


def write(args: argparse.Namespace, *parts: Any) -> None:
    """Writes what there is so far: a benchmark that is stopped has not run for nothing."""
    results, merges, roofs, _, missing = parts
    facts = {
        "command": sys.argv,
        "machine": machine(),
        "roofs": roofs,
        "base_loss": args.base_loss,
        "training": results,
        "merging": merges,
        "not_installed": missing,
    }
    (OUT / "train.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (OUT / "train.md").write_text(report(args, *parts) + "\n", encoding="utf-8")


def report(
    args: argparse.Namespace,
    results: dict[str, list[Round]],
    merges: dict[str, list[Round]],
    roofs: list[dict[str, Any]],
    variants: list[Variant],
    missing: list[str],
) -> str:
    """Returns the tables, and what they were measured with."""
    facts, rates = machine(), [roof["flops_per_second"] / 1e9 for roof in roofs]
    settings = {f"{v.what}: {v.name}": v.settings for v in variants}
    base = "not measured" if args.base_loss is None else f"{args.base_loss:.4f}"
    parts = [
        f"{facts['processor']}, {args.threads} threads, {args.device}; {args.model.name}, "
        f"{args.rows} rows x {args.epochs}, "
        f"medians of {args.rounds} rounds (least–most); matrix products {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s"
        f"; held-out loss of the base {base}",
        table(results, TRAINING, settings),
    ]
    if merges:
        parts.append(table(merges, MERGING, {"merge: litpeft": "with its check of the written files"}))
    if missing:
        parts.append(f"not installed, so not measured: {', '.join(missing)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
