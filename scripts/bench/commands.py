"""What is compared in training: each tool with its defaults and with the best settings that its documentation names.

The same for all: model, rows, alpaca text with the prompt masked, LoRA of rank 8 and alpha 16 on the seven linear
layers of each block without dropout, 8 rows an optimiser step, AdamW without weight decay, cosine schedule from the
same learning rate, threads. Lit-GPT cannot do without a warmup, so it spends its first step at learning rate 0.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.shapes import ALPHA, RANK

PYTHON = {"litpeft": Path(".venv/bin/python"), "litgpt": Path(".bench/litgpt/bin/python")}
PYTHON["trl"] = Path(".bench/trl/bin/python")
ROWS_A_STEP = 8


def litgpt_copy(model: Path) -> Path:
    """Returns the folder of a model in Lit-GPT's own format, which environments.sh makes."""
    return Path(".bench/models/litgpt") / f"of-{model.name}"


@dataclass(frozen=True)
class Job:
    """What is asked of a run: the same for every tool."""

    model: Path
    rows: Path  # folder of rows.py
    out: Path
    epochs: int
    lr: float
    max_length: int  # tokens of the longest row
    steps: int
    tokens: int  # of the rows, in all
    seed: int
    device: str


@dataclass(frozen=True)
class Variant:
    """One tool with one set of settings."""

    name: str
    tool: str
    what: str  # lora | qlora | full
    settings: str  # what the table says of it
    options: dict[str, Any]  # the tool's own, over the common ones
    cuda_only: bool = False


TRL_FAST = {"gradient_checkpointing": False, "dataloader_num_workers": 0}
BF16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
PACKED = {"packing": True, "packing_strategy": "bfd"}

VARIANTS = [
    Variant("litpeft", "litpeft", "lora", "defaults: bf16-true, packed", {}),
    Variant("litpeft compiled", "litpeft", "lora", "blocks compiled", {"train.compile": True}),
    Variant("litpeft ac", "litpeft", "lora", "activation checkpointing", {"train.activation_checkpointing": "block"}),
    Variant(
        "litgpt defaults", "litgpt", "lora", "precision left open (bf16-mixed), micro-batch 4", {"precision": None}
    ),
    Variant("litgpt", "litgpt", "lora", "bf16-true, micro-batch 4", {}),
    Variant("litgpt mb1", "litgpt", "lora", "bf16-true, micro-batch 1: no padding", {"micro_batch_size": 1}),
    Variant("trl defaults", "trl", "lora", "float32 weights, bf16 autocast, gradient checkpointing, micro-batch 4", {}),
    Variant("trl", "trl", "lora", "bf16 weights, no gradient checkpointing, micro-batch 4", {**TRL_FAST, **BF16}),
    Variant("trl packed", "trl", "lora", "as trl, packed (bfd) and padding-free", {**TRL_FAST, **BF16, **PACKED}),
    Variant("litpeft", "litpeft", "qlora", "defaults: NF4, double-quantised, packed", {}),
    Variant("trl defaults", "trl", "qlora", "bitsandbytes NF4, gradient checkpointing, micro-batch 4", {}),
    Variant("trl", "trl", "qlora", "bitsandbytes NF4, no gradient checkpointing", {**TRL_FAST, **BF16}),
    Variant("trl packed", "trl", "qlora", "as trl, packed (bfd)", {**TRL_FAST, **BF16, **PACKED}),
    Variant("litgpt", "litgpt", "qlora", "bnb.nf4-dq, which needs a GPU", {"quantize": "bnb.nf4-dq"}, cuda_only=True),
    Variant("litpeft", "litpeft", "full", "defaults", {}),
    Variant(
        "litgpt defaults", "litgpt", "full", "precision left open (bf16-mixed), micro-batch 4", {"precision": None}
    ),
    Variant("litgpt", "litgpt", "full", "bf16-true, micro-batch 4", {}),
    Variant("trl", "trl", "full", "bf16 autocast, no gradient checkpointing, micro-batch 4", TRL_FAST),
]


def choose(whats: list[str], tools: list[str], names: list[str], device: str) -> list[Variant]:
    """Returns the variants that are asked for; `names` narrows them to some, if it names any."""
    asked = [v for v in VARIANTS if v.what in whats and v.tool in tools and (device == "cuda" or not v.cuda_only)]
    return [v for v in asked if not names or v.name in names]


def command(variant: Variant, job: Job, record: Path) -> list[str]:
    """Returns the command line of a run, which leaves what was observed in `record`; writes its settings file."""
    job.out.mkdir(parents=True, exist_ok=True)
    words = {"litpeft": litpeft_words, "litgpt": litgpt_words, "trl": trl_words}[variant.tool](variant, job)
    observe = [str(PYTHON[variant.tool]), "-m", "scripts.bench.observe"]
    return [*observe, str(record), variant.tool, *map(str, words)]


def litpeft_words(variant: Variant, job: Job) -> list[object]:
    options = {
        "base.dir": job.model,
        "data.path": job.rows / "train.json",
        "data.template": "alpaca",
        "data.validation_split": 0,
        "data.max_length": job.max_length,
        "data.seed": job.seed,
        "train.batch_size": ROWS_A_STEP,
        "train.epochs": job.epochs,
        "train.lr": job.lr,
        "train.warmup_steps": 0,
        "train.seed": job.seed,
        "checkpoint.interval": 0,
        "out": job.out / "run",
    }
    if variant.what != "full":
        options |= {"method.rank": RANK, "method.alpha": ALPHA, "base.precision": "bf16-true"}
    options |= variant.options
    return ["finetune", variant.what, *(word for k, v in options.items() for word in (f"--{k}", v)), "--overwrite"]


def litgpt_words(variant: Variant, job: Job) -> list[object]:
    options = {"precision": "bf16-true", "micro_batch_size": 4, **variant.options}
    settings: dict[str, Any] = {
        "checkpoint_dir": str(litgpt_copy(job.model)),
        "out_dir": str(job.out / "run"),
        "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": str(job.rows), "mask_prompt": True}},
        "train": {
            "global_batch_size": ROWS_A_STEP,
            "micro_batch_size": options.pop("micro_batch_size"),
            "lr_warmup_steps": 1,
            "epochs": job.epochs,
            "max_steps": job.steps,
            "max_seq_length": job.max_length,
            "save_interval": None,
        },
        "eval": {"interval": 10**6, "max_iters": 1, "final_validation": False},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": job.lr, "weight_decay": 0.0}},
        "seed": job.seed,
    }
    if variant.what != "full":
        layers = ("query", "key", "value", "projection", "mlp")
        settings |= {f"lora_{name}": True for name in layers}
        settings |= {"lora_head": False, "lora_r": RANK, "lora_alpha": int(ALPHA), "lora_dropout": 0.0}
    settings |= {key: value for key, value in options.items() if value is not None}
    path = write(job.out / "litgpt.json", settings)
    return ["finetune_full" if variant.what == "full" else "finetune_lora", "--config", path]


def trl_words(variant: Variant, job: Job) -> list[object]:
    options = dict(variant.options)
    micro = 1 if options.get("packing") else 4
    # a packed row stands for the 8 rows of a step, so that as many steps are taken
    packed = -(-job.tokens * job.epochs // job.steps // 64) * 64
    sft = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 1 if options.get("packing") else ROWS_A_STEP // micro,
        "max_length": max(packed, job.max_length) if options.get("packing") else job.max_length,
        "num_train_epochs": job.epochs,
        "learning_rate": job.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "seed": job.seed,
        "use_cpu": job.device == "cpu",
        **options,
    }
    lora = {"r": RANK, "lora_alpha": int(ALPHA), "lora_dropout": 0.0, "target_modules": "all-linear"}
    settings = {
        "model": str(job.model),
        "rows": str(job.rows / "prompts.jsonl"),
        "out": str(job.out / "run"),
        "sft": sft,
        "lora": None if variant.what == "full" else lora,
        "quantize": variant.what == "qlora",
    }
    return [write(job.out / "trl.json", settings)]


def write(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return path


def loss_arguments(variant: Variant, job: Job) -> list[object]:
    """Returns what losses.py is told to measure a run's result."""
    run, full = job.out / "run", variant.what == "full"
    kind, path = {
        "litpeft": ("litpeft", run),
        "trl": ("folder" if full else "peft", run),
        "litgpt": (
            "litgpt_full" if full else "litgpt",
            run / "final" / ("lit_model.pth" if full else "lit_model.pth.lora"),
        ),
    }[variant.tool]
    storage = ["nf4"] if variant.what == "qlora" and variant.tool != "litpeft" else []
    return [job.model, job.rows / "tokens.json", kind, path, *storage]
