"""The files of a run beside its weights: run.yaml when it begins, the report when it ends."""

import json
import re
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from litpeft import __version__
from litpeft.core.json import jsonable
from litpeft.core.recognise import ADAPTER_TENSORS
from litpeft.core.terminal import command_line, say
from litpeft.data.sources import find
from litpeft.exchange.run import resume_command
from litpeft.model.delta import trainable
from litpeft.model.fold import unfoldable
from litpeft.model.gpt import GPT
from litpeft.train.ending import Ended
from litpeft.train.fit import Trainer
from litpeft.train.preparation import Preparation, base_parameters
from litpeft.train.progress import Progress
from litpeft.train.rejected import add_rejected
from litpeft.train.report import RunFacts, draw, summary_lines, write_texts


def begin_run(run: Preparation) -> None:
    """Writes run.yaml, which can be used as --config, and the rows that were rejected."""
    out = Path(run.settings.out)
    once = {"resume": False, "resume_changed": (), "overwrite": False}  # of one command, not of the run
    record = asdict(run.settings) | once | {"method": asdict(run.method)}
    text = yaml.safe_dump(jsonable(record), sort_keys=False, allow_unicode=True)
    command = command_line("finetune", run.name, "--config", out / "run.yaml", "--out", "ANOTHER")
    comment = "".join(f"# {line}\n" for line in command.split("\n"))
    (out / "report.md").unlink(missing_ok=True)  # the run is not over: see finished_at
    (out / "run.yaml").write_text(comment + text, encoding="utf-8")
    add_rejected(run)


def epochs(run: Preparation, progress: Progress) -> float:
    """Returns how often the run has seen each row; of a stream, whose end is not known, the whole epochs."""
    size, rows = run.settings.train.batch_size, len(run.rows.train)
    if run.stream is not None:
        return progress.epoch
    whole, more = divmod(progress.step, -(-rows // size))
    return whole + more * size / rows


def report(run: Preparation, model: GPT, trainer: Trainer, ended: Ended) -> None:
    """Writes the report and prints its summary."""
    progress, fabric, log = trainer.progress, trainer.fabric, trainer.log
    settings, name, out = run.settings, run.name, Path(run.settings.out)
    base, device = Path(settings.base.dir), fabric.device
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    where = str(device)
    if fabric.world_size > 1:
        where = f"{fabric.world_size} of {device.type}, {'fsdp' if settings.strategy == 'fsdp' else 'ddp'}"
    edge = max(1, len(progress.losses) // 20)
    _, held_out = find(settings.data.path, settings.data.validation_path)
    rows = str(held_out[0]) if len(held_out) == 1 else settings.data.validation_path or settings.data.path
    columns = ["--columns", json.dumps(settings.data.columns)] if settings.data.columns else []
    columns += ["--pairs"] if settings.preference.loss else []
    named = held_out and isinstance(rows, str)
    evaluation = [command_line("evaluate", out, rows, *columns)] if named else []
    merging = [] if run.method.writes_model or unfoldable(model) else [command_line("merge", out)]
    facts = RunFacts(
        title=f"{name} on {base.name}",
        command=command_line("finetune", name, "--config", out / "run.yaml", "--out", f"{out}-again"),
        method=name,
        settings=asdict(run.method),
        base=str(base),
        parameters=base_parameters(model),
        precision=run.precision.name + (f", linear layers in {held}" if (held := settings.base.quantize) else ""),
        data=str(run.rows.report),
        trainable=sum(p.numel() for p in trainable(model).values()),
        init_from=(run.facts["init_from"] or {}).get("path", ""),
        delta_bytes=sum(
            path.stat().st_size for path in (out / "final").glob("*.safetensors") if path.name != ADAPTER_TENSORS
        ),
        steps=progress.step,
        epochs=epochs(run, progress),
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        total_seconds=0.0,  # set when the picture is drawn
        tokens_per_second=progress.tokens / progress.seconds,
        device=where,
        threads=torch.get_num_threads(),
        versions={"litpeft": __version__, "torch": torch.__version__},
        peak_memory=memory,
        first_loss=sum(progress.losses[:edge]) / edge,
        last_loss=sum(progress.losses[-edge:]) / edge,
        validation=progress.validations,
        metric=settings.validation.metric,
        preference=settings.preference.loss or "",
        preferred=progress.preferred,
        stopped=progress.stopped,
        best=progress.best,
        samples=progress.samples,
        rows=ended.rows,
        neutral=ended.neutral,
        next_commands=[*evaluation, command_line("chat", out), *merging],
        go_on=resume_command(name, out) if progress.exit_code or progress.out_of_time else "",
    )
    if not (out / "run.yaml").exists():  # the folder was removed while the run went on
        begin_run(run)
    with trainer.timed("ending"):
        draw(out, facts, log.curve)
    progress.elapsed = trainer.clock()
    facts = replace(facts, total_seconds=progress.startup + progress.elapsed, spent=spent(progress))
    path = write_texts(out, facts, bool(log.curve))
    say("\n".join(summary_lines(facts)))
    say(f"the whole story: {path}")


def spent(progress: Progress) -> dict[str, float]:
    """Returns the seconds of a run by what they were spent in; they add up to all of its time."""
    parts = {
        "loading": progress.startup - progress.reading,
        "reading rows": progress.reading,
        "training": progress.seconds,
        "measuring": progress.measuring,
        "saving": progress.saving,
        "reports": progress.ending,
    }
    return parts | {"the rest": progress.startup + progress.elapsed - sum(parts.values())}


def peak_memory() -> int:
    """Returns the most memory that this process has held, in bytes.

    On Linux the kernel says it in /proc. What getrusage says is at least what the program held that started this one.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    if found is not None:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
