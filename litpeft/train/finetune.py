"""The command `litpeft finetune METHOD`: settings in, a folder with what was learned out."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from litpeft.build import Loaded, build
from litpeft.config import ModelConfig, read_config
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load, show
from litpeft.distributed import is_first
from litpeft.errors import UserError
from litpeft.folders import alone, check_place, refuse_existing, remove_leftovers, replaced
from litpeft.identity import config_identity, tokenizer_identity
from litpeft.launch import check_world
from litpeft.memory import out_of_memory
from litpeft.methods.base import Method, put, trainable
from litpeft.model import GPT
from litpeft.precision import Precision, Storage, pick_device, pick_precision
from litpeft.run import base_facts, save_result
from litpeft.settings.train import Finetune
from litpeft.terminal import lasting, say, tell
from litpeft.tokenizer import Tokenizer
from litpeft.train.checkpoints import Checkpoint, Checkpoints, room
from litpeft.train.compiled import compile_blocks
from litpeft.train.devices import check_agreement, make_fabric, sharder
from litpeft.train.fit import Trainer, total_steps
from litpeft.train.log import Log
from litpeft.train.micro_tokens import fitting_tokens
from litpeft.train.optim import make_optimizer
from litpeft.train.preflight import check_held_out, check_run
from litpeft.train.progress import Progress
from litpeft.train.records import begin_run, empty_model, plain, report
from litpeft.train.resume import began, check_same_run, circumstances, find_saved, finished_at, rows_sha256
from litpeft.train.samples import Question, askable, exact_share, show_sample
from litpeft.train.shortage import Shortage
from litpeft.train.signals import StopSignals


def finetune(settings: Finetune, name: str, method: Method) -> None:
    """Trains `method` as the settings say; leaves run.yaml, metrics.csv, final/ and report.md in `settings.out`."""
    began, first = time.perf_counter(), is_first()
    said, told = (say, tell) if first else (lambda text: None,) * 2
    with lasting("stdout", "stderr"), StopSignals(told) as signals:
        run = prepare(settings, name, method, said)
        if run is None:
            return
        try:
            progress = run.train(signals, began)
        except Exception as error:
            if not out_of_memory(error) or (isinstance(error, UserError) and error.exit_code == 6):
                raise
            longest = max(len(row.ids) for row in run.rows.train)
            raise Shortage(settings, method, run.shapes, run.precision, longest).error(error) from error
    if progress.exit_code:
        sys.exit(progress.exit_code)


def prepare(settings: Finetune, name: str, method: Method, say: Callable[[str], None]) -> "Preparation | None":
    """Returns a run that can begin or go on, or None if nothing is left to do. What would go wrong later does here."""
    out, base = Path(settings.out), Path(settings.base.dir)
    check_world(settings.devices, settings.num_nodes)
    # 1. the output; each rank looks: it cannot wait for one that has left already
    clear = is_first() and not settings.dry_run
    check_place(out)
    if not settings.resume:
        refuse_existing(out, settings.overwrite, clear)
    elif clear:
        remove_leftovers(out)
    for kept in filter(None, (base, settings.data.path, settings.data.validation_path)):
        if Path(kept).resolve().is_relative_to(out.resolve()):
            raise UserError("CONFIG-037", f"the run would replace {kept}", where="out", hint="name another folder")
    checkpoints = Checkpoints(out / "checkpoints", settings.checkpoint.keep_last, say, clear)
    saved = find_saved(out, checkpoints, say) if settings.resume else None
    # 2. model files and rows
    device = pick_device()
    precision = pick_precision(settings.base.precision, device, "base.precision")
    _, config = read_config(base)
    tokenizer = Tokenizer.load(base)
    tokenizer.check_vocabulary(config.vocab_size)
    start = began(saved)
    template = ChatTemplate(tokenizer, settings.data.template, now=start)
    rows = load(settings.data, tokenizer, template, config.max_positions)
    say(str(rows.report))
    say(f"precision   {precision.name} on {device}, threads: {torch.get_num_threads()}")
    steps = total_steps(len(rows.train), settings.train)
    if settings.train.warmup_steps > steps:
        say(f"train.warmup_steps {settings.train.warmup_steps} is longer than the run; {steps} is taken")
    questions = askable(template, config.max_positions, rows.validation[: settings.validation.max_rows])
    # 3. what the run will need
    check_held_out(settings, len(rows.validation), len(questions))
    weights, shapes = check_run(settings, method, precision, device)
    if is_first():
        dtype = method.trained_dtype(precision.weights)
        trained = dtype.itemsize * sum(p.numel() for p in trainable(shapes).values())
        room(out, bytes_needed(settings, trained, bool(rows.validation), saved is not None))
    fingerprint = weights.fingerprint()  # which compares the files with their checksums
    if settings.dry_run and saved is None:
        dry_run(name, config, shapes, rows, tokenizer, steps)
        return None
    # 4. is it the same run?
    facts = {
        "method": name,
        "settings": plain(asdict(settings) | {"method": asdict(method)}),
        "base": fingerprint,
        "reads": {
            "config": config_identity(base),
            "tokenizer": tokenizer_identity(template),
            "template": template.hash,
        },
        "rows": rows_sha256(rows.train, rows.validation),
        "counts": {
            part: f"{count.rows:,} rows, {count.tokens:,} tokens, {count.trained:,} trained"
            for part, count in (("rows to train on", rows.report.train), ("held-out rows", rows.report.validation))
        },
        "began": start.isoformat(),
        "circumstances": circumstances(device, settings.devices * settings.num_nodes),
    }
    facts["settings"]["base"]["precision"] = precision.name  # auto may be another one on another machine
    if saved is not None and settings.train.micro_tokens == "auto":
        settings.train.micro_tokens = saved.facts["settings"]["train"]["micro_tokens"]
        facts["settings"]["train"]["micro_tokens"] = settings.train.micro_tokens
    if saved is not None:
        lines = check_same_run(saved, facts, settings.resume_changed, say)
        if not lines and (done := finished_at(out)) is not None:
            say(f"{out} is finished: step {done}; nothing is left to do")
            return None
        begin = "going on after" if saved.step <= steps else "nothing is left to train:"
        say(f"{begin} step {saved.step} of {steps}")
    if settings.dry_run:
        dry_run(name, config, shapes, rows, tokenizer, steps)
        return None
    return Preparation(
        settings,
        name,
        method,
        config,
        rows,
        tokenizer,
        template,
        shapes,
        questions,
        precision,
        checkpoints,
        saved,
        facts,
        steps,
    )


@dataclass
class Preparation:
    """All that a run needs before the model is built."""

    settings: Finetune
    name: str
    method: Method
    config: ModelConfig
    rows: DataSet
    tokenizer: Tokenizer
    template: ChatTemplate
    shapes: GPT  # of the model with the method attached, without memory
    questions: list[Question]  # that are asked of the model at each measurement
    precision: Precision
    checkpoints: Checkpoints
    saved: Checkpoint | None
    facts: dict[str, Any]
    steps: int

    def train(self, signals: StopSignals, began: float) -> Progress:
        """Builds the model, trains it, and writes what is left of the run; `began` is when the command did."""
        settings, method, out = self.settings, self.method, Path(self.settings.out)
        fabric = make_fabric(settings, self.precision, pick_device())
        check_agreement(fabric, self.agreed())
        # 1. the model, with the method at its start
        torch.manual_seed(settings.train.seed)
        held = settings.base
        storage = None if held.quantize is None else Storage(held.quantize, held.double_quantize, held.cache)
        device = torch.device("cpu") if settings.cpu_offload else fabric.device
        base = Path(settings.base.dir)
        shard = sharder(settings, self.precision, fabric)
        model = build(base, self.precision.weights, method, device, storage, shard, fabric.is_global_zero)
        model.recompute = settings.train.activation_checkpointing
        if settings.train.compile:
            compile_blocks(model, fabric.device)
        wrapped = fabric.setup_module(model, move_to_device=False)
        scaled = self.precision.fabric == "16-mixed"
        optimizer = make_optimizer(settings.train, trainable(model).values(), fabric.device, scaled)
        optimizer = fabric.setup_optimizers(optimizer)
        self.settle_micro_tokens(wrapped, fabric)
        # 2. the run folder, and the run
        log = self.log(fabric.is_global_zero)
        with ExitStack() as stack:
            if fabric.is_global_zero:
                stack.enter_context(alone(out))
                if not self.saved:
                    stack.enter_context(
                        replaced(out, settings.overwrite or settings.resume, lambda: log.steps_done > 0)
                    )
                begin_run(out, settings, self.name, method, self.rows)
            fabric.barrier()
            stack.enter_context(log)
            signals.tell = log.message
            loaded = Loaded(model, self.tokenizer, self.template, settings.data.system, None)
            trainer = Trainer(
                fabric,
                wrapped,
                model,
                optimizer,
                self.rows.train,
                self.rows.validation,
                settings,
                log,
                self.checkpoints,
                self.facts,
                partial(show_sample, fabric, loaded, self.questions, settings.validation.sample_tokens, log),
                partial(exact_share, fabric, loaded, self.questions),
                signals,
            )
            if self.saved is not None:
                trainer.resume(self.saved)
            trainer.progress.startup += time.perf_counter() - began
            progress = trainer.fit()
            step, lost = self.choose(model, progress)
            if not progress.exit_code:
                trainer.check_result()
            self.save(model, progress, step, storage, fabric.is_global_zero)
            progress.elapsed = trainer.clock()
            if fabric.is_global_zero:
                report(self, model, progress, fabric, log)
            if lost is not None:
                raise lost
        fabric.barrier()
        return progress

    def settle_micro_tokens(self, model: torch.nn.Module, fabric: Fabric) -> None:
        """Sets how many tokens a forward pass takes, where that is left open; a resumed run takes as many as before."""
        train, said = self.settings.train, self.facts["settings"]["train"]
        if train.micro_tokens == "auto" and self.settings.data.packing:
            train.micro_tokens = said["micro_tokens"] = fitting_tokens(model, fabric)

    def agreed(self) -> dict[str, Any]:
        """Returns by name what must be the same on every rank; their paths need not be."""
        said = self.facts["settings"]
        same = {key: said[key] for key in ("train", "validation", "checkpoint", "method")}
        same |= {"base.precision": self.precision.name, "base.quantize": said["base"]["quantize"]}
        same |= {"the method": self.name, "the base's weights": self.facts["base"], "the rows": self.facts["rows"]}
        same |= {"the base's config, tokenizer or template": self.facts["reads"]}
        return same | {"the checkpoint that they resume from": self.saved and self.saved.step}

    def log(self, enabled: bool) -> Log:
        """Returns where the loop reports to; a resumed run goes on in its files."""
        limit, at = self.settings.train.max_time, self.saved
        elapsed = at.state["progress"]["elapsed"] if at else 0.0
        seconds = None if limit is None else elapsed + 60 * limit
        step = at.step if at else 0
        return Log(Path(self.settings.out), self.steps, self.settings.tensorboard, enabled, step, seconds)

    def choose(self, model: GPT, progress: Progress) -> tuple[int, UserError | None]:
        """Returns the step whose weights the run ends with, and puts them into the model.

        Where the best checkpoint is lost, those of the last step are all there is: they are to be saved first, and the
        error that is returned raised then.
        """
        best = progress.best
        if self.settings.validation.final == "last" or best is None or best[0] == progress.step or progress.exit_code:
            return progress.step, None
        try:
            put(model, self.checkpoints.at(best[0]).tensors("delta"))
        except UserError as error:
            error.hint = f"final/ holds the weights of step {progress.step}, not the best of step {best[0]}"
            return progress.step, error
        return best[0], None

    def save(self, model: GPT, progress: Progress, step: int, storage: Storage | None, first: bool) -> None:
        """Writes final/."""
        base, reads = Path(self.settings.base.dir), self.facts["reads"]
        facts = {
            "base": base_facts(base, storage, self.facts["base"], reads["config"], reads["tokenizer"]),
            "template": {
                "name": self.template.name,
                "sha256": self.tokenizer.template_hash,
                "system": self.settings.data.system,
            },
            "precision": self.precision.name,
            "step": step,
            "steps_done": progress.step,
            "steps_planned": max(self.steps, progress.step),  # fewer may be asked for than are done already
            "finished": not progress.exit_code and not progress.out_of_time,
        }
        save_result(Path(self.settings.out) / "final", model, self.name, self.method, base, facts, first)


def bytes_needed(settings: Finetune, trained: int, held_out: bool, resumes: bool) -> int:
    """Returns the room on disk for the checkpoints that are kept, the one being written, and the result.

    `trained` are the bytes of what trains; a run that `resumes` has a part of its checkpoints already.
    """
    best = settings.checkpoint.keep_best and held_out
    if settings.checkpoint.interval == 0 and not best:
        return 3 * trained + trained  # one more, where the run is stopped: those that are there stay beside it
    kept = settings.checkpoint.keep_last + best + 1
    there = (Path(settings.out) / "checkpoints").rglob("*") if resumes else ()
    return 3 * trained * kept + trained - sum(p.stat().st_size for p in there)  # two moments for each parameter


def dry_run(name: str, config: ModelConfig, shapes: GPT, rows: DataSet, tokenizer: Tokenizer, steps: int) -> None:
    """Prints what the run would do; trains nothing, writes nothing, reads no weights."""
    trained = {key: p.numel() for key, p in trainable(shapes).items()}
    train, new = sum(trained.values()), sum(count for key, count in trained.items() if key not in shapes.base_keys)
    total = sum(p.numel() for p in empty_model(config).parameters()) + new  # of which a storage packs several into one
    say(f"{name} would train {train:,} of {total:,} parameters ({train / total:.3%}) in {steps} optimizer steps")
    say(f"{rows.train[0].source}, as the model sees it (what is trained is marked):")
    say(show(rows.train[0], tokenizer, color=sys.stdout.isatty()), colored=True)
