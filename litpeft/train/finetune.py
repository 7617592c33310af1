"""The command `litpeft finetune METHOD`: settings in, a folder with what was learned out."""

import json
import logging
import os
import resource
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import yaml
from lightning.fabric import Fabric

from litpeft import __version__
from litpeft.build import Loaded, build
from litpeft.checkpoint import refuse_existing, replaced
from litpeft.config import read_config
from litpeft.data.sources import find
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, Row, load, show
from litpeft.errors import UserError
from litpeft.evaluate import Exchange
from litpeft.generate import answer
from litpeft.methods.base import Method, attach, delta_state, trainable
from litpeft.model import GPT
from litpeft.precision import pick_device, pick_precision
from litpeft.run import save_delta
from litpeft.settings.generate import Sampling
from litpeft.settings.train import Finetune
from litpeft.tokenizer import Tokenizer
from litpeft.train.fit import Progress, fit, total_steps
from litpeft.train.log import Log
from litpeft.train.optim import make_optimizer
from litpeft.train.report import RunFacts, Sample, summary_lines, write_report


def finetune(settings: Finetune, name: str, method: Method) -> None:
    """Trains `method` as the settings say; leaves run.yaml, metrics.csv, final/ and report.md in `settings.out`."""
    out, base = Path(settings.out), Path(settings.base.dir)
    if not settings.dry_run:
        refuse_existing(out, settings.overwrite)
    for kept in filter(None, (base, settings.data.path, settings.data.validation_path)):
        if Path(kept).resolve().is_relative_to(out.resolve()):
            raise UserError("CONFIG-037", f"the run would replace {kept}", where="out", hint="name another folder")
    # 1. what would go wrong later goes wrong now: settings, model files, rows
    device = pick_device()
    precision = pick_precision(settings.base.precision, device, "base.precision")
    _, config = read_config(base)
    tokenizer = Tokenizer.load(base)
    tokenizer.check_vocabulary(config.vocab_size)
    template = ChatTemplate(tokenizer, settings.data.template)
    rows = load(settings.data, tokenizer, template, config.max_positions)
    print(rows.report)
    steps = total_steps(len(rows.train), settings.train)
    if settings.train.warmup_steps > steps:
        print(f"train.warmup_steps {settings.train.warmup_steps} is longer than the run; {steps} is taken")
    if settings.dry_run:
        return dry_run(settings, name, method, rows, tokenizer, steps)
    # 2. the model, with the method at its start
    torch.manual_seed(settings.train.seed)
    model = build(base, precision.weights, method, device)
    model.recompute = settings.train.activation_checkpointing
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=device.type, devices=1, precision=precision.fabric)
    wrapped = fabric.setup_module(model, move_to_device=False)
    optimizer = fabric.setup_optimizers(make_optimizer(settings.train, trainable(model).values()))
    # 3. the run, and what is left of it
    loaded = Loaded(model, tokenizer, template, settings.data.system, None)
    seconds = None if settings.train.max_time is None else 60 * settings.train.max_time
    samples: list[Sample] = []
    with replaced(out, settings.overwrite):
        begin_run(out, settings, name, method, rows)
        with Log(out, steps, settings.tensorboard, max_time=seconds) as log:
            tokens = settings.validation.sample_tokens
            sample = partial(show_sample, fabric, loaded, rows.validation, tokens, log, samples)
            progress = fit(fabric, wrapped, optimizer, rows.train, rows.validation, settings, log, sample)
        facts = {
            "template": {"name": template.name, "sha256": tokenizer.template_hash, "system": settings.data.system},
            "precision": precision.name,
            "step": progress.step,
        }
        save_delta(out / "final", delta_state(model), name, method, base, facts)
        report(out, settings, name, method, model, rows, progress, samples, precision.name)
    if progress.exit_code:
        sys.exit(progress.exit_code)


def dry_run(settings: Finetune, name: str, method: Method, rows: DataSet, tokenizer: Tokenizer, steps: int) -> None:
    """Prints what the run would do; trains nothing, writes nothing, reads no weights."""
    with torch.device("meta"):
        model = GPT(read_config(Path(settings.base.dir))[1])
        attach(model, method)
    total, train = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trainable(model).values())
    print(f"{name} would train {train:,} of {total:,} parameters ({train / total:.3%}) in {steps} optimizer steps")
    print(f"{rows.train[0].source}, as the model sees it (what is trained is marked):")
    print(show(rows.train[0], tokenizer, color=sys.stdout.isatty()))


def begin_run(out: Path, settings: Finetune, name: str, method: Method, rows: DataSet) -> None:
    """Writes run.yaml, which is itself a --config, and the rows that were rejected."""
    record = asdict(settings) | {"method": asdict(method)}
    text = yaml.safe_dump(plain(record), sort_keys=False, allow_unicode=True)
    command = f"# litpeft finetune {name} --config {out / 'run.yaml'} --out ANOTHER\n"
    (out / "run.yaml").write_text(command + text, encoding="utf-8")
    if rows.rejected:
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows.rejected]
        (out / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")


def plain(value: object) -> object:
    """Returns `value` with lists for tuples, as YAML knows them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def show_sample(
    fabric: Fabric, loaded: Loaded, held_out: list[Row], tokens: int, log: Log, samples: list[Sample], step: int
) -> None:
    """Answers the first two held-out rows that can be asked and shows the first; `samples` keeps the first and last."""
    questions = askable(loaded, held_out)[:2]
    if not tokens or not questions:
        return
    exchanges, prompts = zip(*questions, strict=True)
    loaded.model.eval()
    with fabric.autocast():
        answers = answer(
            loaded.model, prompts, loaded.tokenizer, Sampling(max_new_tokens=tokens), loaded.template.stop_ids
        )
    loaded.model.train()
    if step == 0:
        log.message(f"  asked:    {exchanges[0].asked}")
        log.message(f"  expected: {exchanges[0].expected}")
    log.message(f"  answered: {answers[0].text}")
    for i, exchange in enumerate(exchanges):
        first = samples[i].before if len(samples) > i else answers[i].text
        samples[i : i + 1] = [Sample(exchange.asked, exchange.expected, before=first, after=answers[i].text)]


def askable(loaded: Loaded, rows: list[Row]) -> list[tuple[Exchange, list[int]]]:
    """Returns exchanges, with their prompts as tokens, that the template takes and that leave room for an answer."""
    found = []
    for row in rows[:20]:
        exchange = Exchange.of(row)
        try:
            prompt = loaded.template.prompt(exchange.before)
        except ValueError:  # a chat that the assistant opens, say: learnt from, but not to be asked
            continue
        if 0 < len(prompt) < loaded.model.config.max_positions:
            found.append((exchange, prompt))
    return found


def report(
    out: Path,
    settings: Finetune,
    name: str,
    method: Method,
    model: GPT,
    rows: DataSet,
    progress: Progress,
    samples: list[Sample],
    precision: str,
) -> None:
    """Writes report.md and loss.png, and prints the same in a few lines."""
    base = Path(settings.base.dir)
    device = next(model.parameters()).device
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    edge = max(1, len(progress.losses) // 20)
    _, held_out = find(settings.data.path, settings.data.validation_path)
    evaluation = [f"litpeft evaluate {out} {held_out}"] if held_out else []
    facts = RunFacts(
        title=f"{name} on {base.name}",
        command=shlex.join(["litpeft", "finetune", name, "--config", str(out / "run.yaml"), "--out", f"{out}-again"]),
        method=name,
        settings=asdict(method),
        base=str(base),
        parameters=sum(p.numel() for n, p in model.named_parameters() if n in model.base_keys),
        precision=precision,
        data=str(rows.report),
        trainable=sum(p.numel() for p in trainable(model).values()),
        delta_bytes=os.path.getsize(out / "final" / "delta.safetensors"),
        steps=progress.step,
        epochs=progress.step * settings.train.batch_size / len(rows.train),
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / progress.seconds,
        device=str(device),
        threads=torch.get_num_threads(),
        versions={"litpeft": __version__, "torch": torch.__version__},
        stopped=progress.stopped,
        peak_memory=memory,
        first_loss=sum(progress.losses[:edge]) / edge,
        last_loss=sum(progress.losses[-edge:]) / edge,
        validation=progress.validations,
        samples=samples,
        next_commands=[
            *evaluation,
            f"litpeft chat {out}",
            f"litpeft merge {out}",
        ],
    )
    path = write_report(out, facts)
    print("\n".join(summary_lines(facts)))
    print(f"the whole story: {path}")
