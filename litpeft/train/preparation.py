"""What a run needs before its model is built: its files, its rows, and whether it can begin or go on."""

import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from litpeft.core.errors import ConfigError, counted, some
from litpeft.core.folders import refuse_existing, remove_leftovers
from litpeft.core.json import jsonable
from litpeft.core.place import check_place
from litpeft.core.precision import Precision, pick_device, pick_precision
from litpeft.core.safetensors import Weights
from litpeft.core.terminal import is_first, say
from litpeft.data.neutral import neutral_rows
from litpeft.data.rows import Row, show
from litpeft.data.streaming import Stream
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import config_identity, tokenizer_identity
from litpeft.model.added_tokens import KEY, SEARCHED, grown, note_tokens, unseen
from litpeft.model.build import checked_files
from litpeft.model.delta import Method, attach, trainable
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.quantize.quantized import store
from litpeft.train.budget import Budget
from litpeft.train.checkpoints import Checkpoint, Checkpoints
from litpeft.train.compiled import check_compiler
from litpeft.train.devices import check_devices
from litpeft.train.init_from import Init, of_checkpoint, read_init
from litpeft.train.launch import check_world
from litpeft.train.log import summary_writer_class
from litpeft.train.optim import check_optimizer
from litpeft.train.read_rows import fitting_budget, pin_rows, read_rows
from litpeft.train.resume import (
    check_same_run,
    circumstances,
    find_saved,
    finished_at,
    rows_sha256,
    rows_text_sha256,
)
from litpeft.train.room import check_room
from litpeft.train.samples import SHOWN, Question, askable
from litpeft.train.settings import Finetune, Validation
from litpeft.train.shortage import Shortage


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
    memory: Shortage  # what the run needs of its device's
    stream: Stream | None = None  # of the rows to train on, of which `rows` then has the first window

    def agreed(self) -> dict[str, Any]:
        """Returns by name what must be the same on every rank; their paths need not be."""
        said = self.facts["settings"]
        same = {key: said[key] for key in ("train", "preference", "validation", "checkpoint", "method")}
        same |= {"base.precision": self.precision.name, "base.quantize": said["base"]["quantize"]}
        same |= {"the method": self.name, "the base's weights": self.facts["base"], "the rows": self.facts["rows"]}
        same |= {"what the run begins with": self.facts["init_from"]}
        same |= {"the base's config, tokenizer or template": self.facts["reads"]}
        return same | {"the checkpoint that they resume from": self.saved and self.saved.step}


def prepare(settings: Finetune, name: str, method: Method) -> Preparation | None:
    """Returns a run that can begin or go on, or None if nothing is left to do. What would fail later fails here."""
    check_world(settings.devices, settings.num_nodes)
    checkpoints, saved = prepare_output(settings)
    device = pick_device()
    precision = pick_precision(settings.base.precision, device, "base.precision")
    pin_rows(settings)
    method, init, template = read_texts(settings, method, saved)
    weights, shapes = check_run(settings, method, precision, device)
    weights.begin_sums()
    reading = time.perf_counter()
    rows, stream, steps = read_rows(settings, template, shapes.reach)
    if lost := unseen(method, rows.train):
        say(f"warning: {KEY}: none of the first {SEARCHED:,} rows to train on holds {some(lost)}")
    reading = time.perf_counter() - reading
    say(f"precision   {precision.name} on {device}, threads: {torch.get_num_threads()}")
    budget = fitting_budget(settings, rows, steps)
    most = None if settings.validation.metric == "exact" else SHOWN
    questions = askable(template, shapes.reach, rows.validation[: budget.rows], most)
    neutral = neutral_rows(settings.ending.neutral, template, shapes.reach, "ending.neutral")
    check_held_out(settings, len(rows.validation), len(questions), method)
    check_room(settings, method, shapes, precision, bool(rows.validation), saved is not None)
    alone = saved is None and not settings.dry_run and settings.devices * settings.num_nodes == 1
    facts = {
        "method": name,
        "settings": jsonable(asdict(settings) | {"method": asdict(method)}),
        "base": "" if alone else weights.fingerprint(),  # or known once the model is built: it takes seconds
        "reads": {
            "config": config_identity(Path(settings.base.dir)),
            "tokenizer": tokenizer_identity(template),
            "template": template.hash,
        },
        "rows": rows_identity(rows, stream, saved),
        "counts": {
            part: f"{counted(count.rows, 'row')}, {counted(count.tokens, 'token')}, {count.trained:,} trained"
            for part, count in (("rows to train on", rows.report.train), ("held-out rows", rows.report.validation))
        },
        "began": template.now.isoformat(),
        "init_from": saved.facts.get("init_from") if saved else init.facts if init else None,
        "circumstances": circumstances(device, settings.devices * settings.num_nodes),
    }
    facts["settings"]["base"]["precision"] = precision.name  # auto may be another one on another machine
    if init is not None:
        init.check(shapes, facts["reads"]["tokenizer"])
    if saved is not None and not goes_on(settings, saved, facts, steps):
        return None
    longest, gpu = int(rows.train.column("tokens").max()), device.type == "cuda"
    memory = Shortage(settings, method, shapes, precision, longest, gpu=gpu)
    if gpu:
        say(memory.expected(torch.cuda.get_device_name(device), *torch.cuda.mem_get_info(device)))
    if settings.dry_run:
        dry_run(name, shapes, rows, template.tokenizer, steps)
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
        memory,
        stream,
    )


def rows_identity(rows: DataSet, stream: Stream | None, saved: Checkpoint | None) -> str:
    """Returns a hash of the rows, or of a stream's files.

    Earlier versions hashed the rows in another way. If a saved run has that hash of the same rows, it is returned.
    """
    if stream is not None:
        return stream.sha256(rows.validation)
    groups = rows.train, rows.validation
    now, then = rows_sha256(*groups), saved and saved.facts["rows"]
    return now if then in (None, now) or then != rows_text_sha256(*groups) else then


def prepare_output(settings: Finetune) -> tuple[Checkpoints, Checkpoint | None]:
    """Returns the run's checkpoints, and the one to go on from; raises if `out` cannot be written or holds a run.

    Every rank checks it by itself: it could not wait for a rank that has already ended.
    """
    out, clear = Path(settings.out), is_first() and not settings.dry_run
    check_place(out)
    if not settings.resume:
        refuse_existing(out, settings.overwrite, clear)
    elif clear:
        remove_leftovers(out)
    for kept in filter(None, (settings.base.dir, *settings.data.paths, settings.init_from)):
        if Path(kept).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"the run would replace {kept}", where="out", hint="name another folder")
    checkpoints = Checkpoints(out / "checkpoints", settings.checkpoint.keep_last, clear=clear)
    return checkpoints, find_saved(out, checkpoints) if settings.resume else None


def read_texts(
    settings: Finetune, method: Method, saved: Checkpoint | None
) -> tuple[Method, Init | None, ChatTemplate]:
    """Returns the method as the run has it, what a new run begins with, and the template with its tokenizer."""
    base = Path(settings.base.dir)
    _, config = read_config(base)
    tokenizer = Tokenizer.load(base)
    tokenizer.check_vocabulary(config.vocab_size)
    init = read_init(settings, method) if saved is None else None
    method = init.method if init else method if saved is None else of_checkpoint(settings, method, saved)
    note_tokens(method, tokenizer)
    method.read(tokenizer)
    began = datetime.now() if saved is None else datetime.fromisoformat(saved.facts["began"])  # a template may print it
    return method, init, ChatTemplate(tokenizer, settings.data.template, began, settings.data.template_options)


def goes_on(settings: Finetune, saved: Checkpoint, facts: dict[str, Any], steps: int) -> bool:
    """Returns whether a run has anything left to do after a checkpoint; raises if it is not the same run."""
    if settings.train.micro_tokens == "auto":
        micro_tokens = saved.facts["settings"]["train"]["micro_tokens"]
        settings.train.micro_tokens = facts["settings"]["train"]["micro_tokens"] = micro_tokens
    lines = check_same_run(saved, facts, settings.resume_changed)
    out = Path(settings.out)
    if not lines and (done := finished_at(out)) is not None:
        say(f"{out} is finished: step {done}; nothing is left to do")
        return False
    begin = "going on after" if saved.step <= steps else "nothing is left to train:"
    say(f"{begin} step {saved.step} of {steps}")
    return True


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
