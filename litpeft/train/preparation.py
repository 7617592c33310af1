"""What a run needs before its model is built: its files, its rows, and whether it can begin or go on."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from litpeft.core.errors import ConfigError, counted
from litpeft.core.folders import check_disk, check_place, refuse_existing, remove_leftovers
from litpeft.core.json import jsonable
from litpeft.core.precision import Precision, pick_device, pick_precision
from litpeft.core.safetensors import Weights
from litpeft.core.terminal import command_line, is_first, say
from litpeft.data.batches import padding, plan_epoch
from litpeft.data.neutral import neutral_rows
from litpeft.data.readers import STDIN
from litpeft.data.rows import Row, show
from litpeft.data.short_check import concerns
from litpeft.data.sources import pinned
from litpeft.data.streaming import Stream, load_stream
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import config_identity, tokenizer_identity
from litpeft.model.added_tokens import grown, note_tokens
from litpeft.model.build import checked_files
from litpeft.model.delta import Method, attach, delta_state, trainable, training_state
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.quantize.quantized import store
from litpeft.train.budget import Budget, fitting_warmup
from litpeft.train.checkpoints import Checkpoint, Checkpoints
from litpeft.train.compiled import check_compiler
from litpeft.train.devices import check_devices
from litpeft.train.init_from import Init, of_checkpoint, read_init
from litpeft.train.launch import check_world
from litpeft.train.log import summary_writer_class
from litpeft.train.optim import check_optimizer, total_steps
from litpeft.train.resume import check_same_run, circumstances, find_saved, finished_at, rows_sha256
from litpeft.train.samples import SHOWN, Question, askable
from litpeft.train.settings import Finetune, Validation


@dataclass
class Preparation:
    """All that a run needs before the model is built."""

    settings: Finetune
    name: str
    method: Method
    rows: DataSet
    template: ChatTemplate
    shapes: GPT  # of the model with the method attached, without memory
    questions: list[Question]  # that are asked of the model at each measurement
    neutral: list[Row]  # text that shows at the end what was forgotten
    precision: Precision
    checkpoints: Checkpoints
    saved: Checkpoint | None
    init: Init | None  # what a new run begins with
    facts: dict[str, Any]
    steps: int
    budget: Budget
    reading: float  # seconds that reading the rows took
    stream: Stream | None = None  # of the rows to train on, of which `rows` then has the first window

    def agreed(self) -> dict[str, Any]:
        """Returns by name what must be the same on every rank; their paths need not be."""
        said = self.facts["settings"]
        same = {key: said[key] for key in ("train", "validation", "checkpoint", "method")}
        same |= {"base.precision": self.precision.name, "base.quantize": said["base"]["quantize"]}
        same |= {"the method": self.name, "the base's weights": self.facts["base"], "the rows": self.facts["rows"]}
        same |= {"what the run begins with": self.facts["init_from"]}
        same |= {"the base's config, tokenizer or template": self.facts["reads"]}
        return same | {"the checkpoint that they resume from": self.saved and self.saved.step}


def prepare(settings: Finetune, name: str, method: Method) -> Preparation | None:
    """Returns a run that can begin or go on, or None if nothing is left to do. What would fail later fails here."""
    out, base = Path(settings.out), Path(settings.base.dir)
    check_world(settings.devices, settings.num_nodes)
    if STDIN in settings.data.paths and settings.devices * settings.num_nodes > 1:
        what = "only one process can read standard input"
        raise ConfigError(what, where="data.path", hint="write the rows to a file, or train on one device")
    # 1. the output; every rank checks it by itself: it could not wait for a rank that has already ended
    clear = is_first() and not settings.dry_run
    check_place(out)
    if not settings.resume:
        refuse_existing(out, settings.overwrite, clear)
    elif clear:
        remove_leftovers(out)
    for kept in filter(None, (base, *settings.data.paths, settings.init_from)):
        if Path(kept).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"the run would replace {kept}", where="out", hint="name another folder")
    checkpoints = Checkpoints(out / "checkpoints", settings.checkpoint.keep_last, clear=clear)
    saved = find_saved(out, checkpoints) if settings.resume else None
    # 2. model files and rows; sets of the hub as they are now, for a run that can be repeated
    settings.data.path = pinned(settings.data.path)
    if settings.data.validation_path:
        settings.data.validation_path = pinned(settings.data.validation_path)
    device = pick_device()
    precision = pick_precision(settings.base.precision, device, "base.precision")
    _, config = read_config(base)
    tokenizer = Tokenizer.load(base)
    tokenizer.check_vocabulary(config.vocab_size)
    init = read_init(settings, method) if saved is None else None
    method = init.method if init else method if saved is None else of_checkpoint(settings, method, saved)
    note_tokens(method, tokenizer)
    method.read(tokenizer)
    began = datetime.now() if saved is None else datetime.fromisoformat(saved.facts["began"])
    chosen = settings.data.template, began, settings.data.template_options  # when resumed, it prints the same date
    template = ChatTemplate(tokenizer, *chosen)
    weights, shapes = check_run(settings, method, precision, device)
    reading, stream = time.perf_counter(), None
    if settings.data.streaming:
        rows, stream = load_stream(settings.data, template, shapes.reach)
        steps = settings.train.max_steps
    else:
        rows = load_dataset(settings.data, tokenizer, template, shapes.reach)
        steps = total_steps(len(rows.train), settings.train)
    reading = time.perf_counter() - reading
    say(str(rows.report))
    if settings.check_rows:
        check_rows(settings, rows, tokenizer)
    if settings.data.group_by_length:
        say(grouped(settings, rows))
    say(f"precision   {precision.name} on {device}, threads: {torch.get_num_threads()}")
    if (warmup := fitting_warmup(settings.train.warmup_steps, steps)) < settings.train.warmup_steps:
        say(f"train.warmup_steps {settings.train.warmup_steps} are more than a quarter of the run; {warmup} are taken")
    held_out = rows.validation[: settings.validation.max_rows]
    budget = Budget.of(settings, rows.train.column("tokens").tolist(), held_out, steps)
    if note := budget.note(len(held_out), settings.validation.interval):
        say(note)
    most = None if settings.validation.metric == "exact" else SHOWN
    questions = askable(template, shapes.reach, rows.validation[: budget.rows], most)
    neutral = neutral_rows(settings.ending.neutral, template, shapes.reach, "ending.neutral")
    # 3. what the run will need
    check_held_out(settings, len(rows.validation), len(questions), method)
    if is_first():
        dtype = method.trained_dtype(precision.weights)
        trained = dtype.itemsize * sum(p.numel() for p in trainable(shapes).values())
        state = sum(tensor.nbytes for tensor in training_state(shapes).values())
        held = dtype.itemsize * sum(tensor.numel() for tensor in delta_state(shapes).values())
        result = held if method.writes_model else 2 * held  # final/ says it for peft, too
        needed = bytes_needed(settings, 2 * trained + held + state, result, bool(rows.validation), saved is not None)
        hint = "make room, set `out` to another disk, lower checkpoint.keep_last, or train less (a smaller method.rank)"
        check_disk(out, needed, "the checkpoints", hint)
    fingerprint = weights.fingerprint()  # which compares the files with their checksums
    # 4. is it the same run?
    facts = {
        "method": name,
        "settings": jsonable(asdict(settings) | {"method": asdict(method)}),
        "base": fingerprint,
        "reads": {
            "config": config_identity(base),
            "tokenizer": tokenizer_identity(template),
            "template": template.hash,
        },
        "rows": rows_sha256(rows.train, rows.validation) if stream is None else stream.sha256(rows.validation),
        "counts": {
            part: f"{counted(count.rows, 'row')}, {counted(count.tokens, 'token')}, {count.trained:,} trained"
            for part, count in (("rows to train on", rows.report.train), ("held-out rows", rows.report.validation))
        },
        "began": began.isoformat(),
        "init_from": saved.facts.get("init_from") if saved else init.facts if init else None,
        "circumstances": circumstances(device, settings.devices * settings.num_nodes),
    }
    if init is not None:
        init.check(shapes, facts["reads"]["tokenizer"])
    facts["settings"]["base"]["precision"] = precision.name  # auto may be another one on another machine
    if saved is not None:
        if settings.train.micro_tokens == "auto":
            micro_tokens = saved.facts["settings"]["train"]["micro_tokens"]
            settings.train.micro_tokens = facts["settings"]["train"]["micro_tokens"] = micro_tokens
        lines = check_same_run(saved, facts, settings.resume_changed)
        if not lines and (done := finished_at(out)) is not None:
            say(f"{out} is finished: step {done}; nothing is left to do")
            return None
        begin = "going on after" if saved.step <= steps else "nothing is left to train:"
        say(f"{begin} step {saved.step} of {steps}")
    if settings.dry_run:
        dry_run(name, shapes, rows, tokenizer, steps)
        return None
    return Preparation(
        settings,
        name,
        method,
        rows,
        template,
        shapes,
        questions,
        neutral,
        precision,
        checkpoints,
        saved,
        init,
        facts,
        steps,
        budget,
        reading,
        stream,
    )


def grouped(settings: Finetune, rows: DataSet) -> str:
    """Returns a line on what padding would cost with and without rows grouped by length."""
    train, lengths = settings.train, rows.train.column("tokens").tolist()
    plans = (plan_epoch(len(lengths), train.batch_size, 0, settings.data.seed, given) for given in (lengths, None))
    with_groups, without = (f"{padding(plan, lengths, train.micro_batch_size):.1%}" for plan in plans)
    return f"by length   padding would be {with_groups} of the passes, {without} in random order; nothing is padded"


def check_run(settings: Finetune, method: Method, precision: Precision, device: torch.device) -> tuple[Weights, GPT]:
    """Returns the base's weights, unread, and the model with its method on the meta device; raises for any error."""
    check_devices(settings, precision, device)
    if settings.train.compile:
        check_compiler(device)
    if settings.tensorboard:
        summary_writer_class()
    config, weights, _ = checked_files(Path(settings.base.dir))
    with torch.device("meta"):
        model = GPT(grown(config, method))
        if settings.base.quantize is not None:
            store(model, settings.base.quantize, settings.base.double_quantize, precision.weights)
        attach(model, method)
    scaled = precision.fabric == "16-mixed"
    check_optimizer(settings.train, model, method.trained_dtype(precision.weights), device, scaled)
    return weights, model


def check_rows(settings: Finetune, rows: DataSet, tokenizer: Tokenizer) -> None:
    """Says what is suspicious about the rows, and the command that says more; nothing where nothing is."""
    data = settings.data
    lines = concerns(rows, tokenizer, data.seed, data.mask_prompt) if is_first() else []
    if not lines:
        return
    say("\n".join(lines))
    if STDIN not in data.paths:
        path = data.path if isinstance(data.path, str) else json.dumps(data.path)
        more = {"columns": data.columns and json.dumps(data.columns), "validation_path": data.validation_path}
        more |= {"format": None if data.format == "auto" else data.format}
        options = [word for key, value in more.items() if value for word in (f"--{key}", value)]
        say(f"which rows: {command_line('data', 'check', path, '--model', settings.base.dir, *options)}")


def check_held_out(settings: Finetune, held_out: int, askable: int, method: Method) -> None:
    """Raises if settings need held-out rows and there are none, or none with a prompt to answer."""
    validation = settings.validation
    if held_out:
        if validation.metric == "exact" and not askable:
            what = "no held-out row can be asked, so there are no answers to compare"
            raise ConfigError(what, where="validation.metric", hint="take validation.metric loss")
        return
    if method.searches:
        what = "this method compares what it has learned on held-out rows, and no row is held out"
        raise ConfigError(what, where="data.validation_split", hint="raise it, or name rows with data.validation_path")
    for key in ("patience", "metric", "final", "interval", "max_rows"):
        value = getattr(validation, key)
        if value != getattr(Validation(), key):
            what = f"{value} is of no use: no row is held out, so nothing is measured"
            hint = "name rows with data.validation_path or raise data.validation_split, or leave it out"
            raise ConfigError(what, where=f"validation.{key}", hint=hint)


def bytes_needed(settings: Finetune, each: int, result: int, held_out: bool, resumes: bool) -> int:
    """Returns the room on disk for the checkpoints that are kept, the one being written, and the result.

    `each` are the bytes of a checkpoint: what is learned, two moments for each parameter, and what the method keeps
    from step to step. `result` are those of final/. A run that `resumes` has a part of its checkpoints already.
    """
    best = settings.checkpoint.keep_best and held_out
    if settings.checkpoint.interval == 0 and not best:
        return each + result  # one more, where the run is stopped: those that are there stay beside it
    kept = settings.checkpoint.keep_last + best + 1
    there = (Path(settings.out) / "checkpoints").rglob("*") if resumes else ()
    return each * kept + result - sum(p.stat().st_size for p in there)


def dry_run(name: str, shapes: GPT, rows: DataSet, tokenizer: Tokenizer, steps: int) -> None:
    """Prints what the run would do; trains nothing, writes nothing, reads no weights."""
    trained = {key: p.numel() for key, p in trainable(shapes).items()}
    train, new = sum(trained.values()), sum(count for key, count in trained.items() if key not in shapes.base_keys)
    total = base_parameters(shapes) + new
    length = counted(steps, "optimizer step")
    say(f"{name} would train {train:,} of {total:,} parameters ({train / total:.3%}) in {length}")
    say(f"{rows.train[0].source}, as the model sees it (what is trained is marked):")
    say(show(rows.train[0], tokenizer, color=sys.stdout.isatty()), colored=True)


def base_parameters(model: GPT) -> int:
    """Returns how many parameters the base has, of which a storage packs several into one."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(model.config).parameters())
