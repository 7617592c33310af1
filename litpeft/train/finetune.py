"""The command `litpeft finetune METHOD`: settings in, a folder with what was learned out."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from litpeft.core.errors import ResourceError, UserError
from litpeft.core.folders import locked, replaced
from litpeft.core.memory import out_of_memory
from litpeft.core.precision import pick_device
from litpeft.core.terminal import is_first, tell, tolerant_streams
from litpeft.data.batches import collate, plan_epoch
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.exchange.run import base_facts, save_result
from litpeft.generate.load import Loaded
from litpeft.model.build import build
from litpeft.model.delta import Method, copy_into, lr_factors, trainable
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.train.compiled import compile_blocks
from litpeft.train.devices import check_agreement, make_fabric, sharder
from litpeft.train.ending import Ended
from litpeft.train.fit import Trainer
from litpeft.train.fused_block import use_fused_step
from litpeft.train.log import Log
from litpeft.train.micro_tokens import fitting_tokens
from litpeft.train.optim import make_optimizer
from litpeft.train.preparation import Preparation, prepare
from litpeft.train.progress import Progress
from litpeft.train.recorded_pass import RecordedPasses
from litpeft.train.records import begin_run, report
from litpeft.train.settings import Finetune
from litpeft.train.signals import StopSignals


def finetune(settings: Finetune, name: str, method: Method, began: float | None = None) -> None:
    """Trains `method` as the settings say; leaves its files in `settings.out`: see finetune_lora.md."""
    began = time.perf_counter() if began is None else began
    told = tell if is_first() else lambda text: None
    with tolerant_streams("stdout", "stderr"), StopSignals(told) as signals:
        run = prepare(settings, name, method)
        if run is None:
            return
        try:
            progress = train(run, signals, began)
        except Exception as error:
            if isinstance(error, ResourceError) or not out_of_memory(error):
                raise
            raise run.memory.error(error) from error
    if progress.exit_code:
        sys.exit(progress.exit_code)


def train(run: Preparation, signals: StopSignals, began: float) -> Progress:
    """Builds the model, trains it, and writes the run's files; `began` is the time at which the command began."""
    settings, method, out = run.settings, run.method, Path(run.settings.out)
    fabric = make_fabric(settings, run.precision, pick_device(), method.idle_parts)
    check_agreement(fabric, run.agreed())
    # 1. the model, with the method at its start
    calibrate(run, fabric.device)
    torch.manual_seed(settings.train.seed)
    held = settings.base
    storage = None if held.quantize is None else Storage(held.quantize, held.double_quantize, held.cache)
    device = torch.device("cpu") if settings.cpu_offload else fabric.device
    base = Path(settings.base.dir)
    shard = sharder(settings, run.precision, fabric)
    saved = run.init.delta if run.init else None if run.saved is None else run.saved.tensors("delta")
    model = build(base, run.precision.weights, method, device, storage, shard, saved)
    run.facts["base"] = model.files.fingerprint()  # at once: its sums are known
    if run.init is not None:
        copy_into(model, run.init.delta)
        run.init.delta.clear()  # it may be large
    model.recompute, model.noise = settings.train.activation_checkpointing, settings.train.neftune
    if shard is None:
        use_fused_step(model, device)
    if settings.train.compile:
        compile_blocks(model, fabric.device)
    wrapped = fabric.setup_module(model, move_to_device=False)
    scaled = run.precision.fabric == "16-mixed"
    optimizer = make_optimizer(settings.train, trainable(model), fabric.device, scaled, lr_factors(model))
    optimizer = fabric.setup_optimizers(optimizer)
    if settings.train.micro_tokens == "auto" and settings.data.packing:  # not in a resumed run: it takes as many again
        recorded = RecordedPasses.of_run(model, fabric, method, settings.preference.loss is not None)
        fitting = fitting_tokens(wrapped, fabric, 0 if recorded is None else recorded.most_tokens)
        settings.train.micro_tokens = run.facts["settings"]["train"]["micro_tokens"] = fitting
    # 2. the run folder, and the run
    log = open_log(run, fabric.is_global_zero)
    with ExitStack() as stack:
        if fabric.is_global_zero:
            stack.enter_context(locked(out))
            if not run.saved:
                stack.enter_context(replaced(out, settings.overwrite or settings.resume, lambda: log.steps_done > 0))
            begin_run(run)
        fabric.barrier()
        stack.enter_context(log)
        signals.tell = log.message
        loaded = Loaded(model, run.template.tokenizer, run.template, settings.data.system, None)
        trainer = Trainer(fabric, wrapped, optimizer, run, loaded, log, signals)
        if run.saved is not None:
            trainer.resume(run.saved)
        trainer.progress.startup += time.perf_counter() - began
        trainer.progress.reading += run.reading
        progress = trainer.fit()
        step, lost = choose(run, model, progress)
        if not progress.exit_code:
            with trainer.timed("measuring"):
                trainer.check_result()
            if step <= trainer.search_step:
                trainer.search()
        with trainer.timed("saving"):
            save(run, model, progress, step, storage, fabric.is_global_zero)
        with trainer.timed("ending"):
            ended = Ended() if progress.exit_code else trainer.ending.after(progress)
        if fabric.is_global_zero:
            report(run, model, trainer, ended)
        if lost is not None:
            raise lost
    fabric.barrier()
    return progress


def calibrate(run: Preparation, device: torch.device) -> None:
    """Has the method of a new run measure the base on its rows, each alone, in a random order; on every rank alike."""
    settings, rows = run.settings, run.rows.train
    if run.saved is not None or run.init is not None or not run.method.defines("calibrate"):
        return
    torch.manual_seed(settings.train.seed)
    model = build(Path(settings.base.dir), run.precision.weights, device=device)
    order = plan_epoch(len(rows), 1, 0, settings.data.seed)
    run.method.calibrate(model, (collate([rows[number]]).to(device) for (number,) in order))


def open_log(run: Preparation, enabled: bool) -> Log:
    """Returns where the loop reports to; a resumed run goes on in its files."""
    limit, at = run.settings.train.max_time, run.saved
    elapsed = at.state["progress"]["elapsed"] if at else 0.0
    seconds = None if limit is None else elapsed + 60 * limit
    step = at.step if at else 0
    return Log(Path(run.settings.out), run.steps, run.settings.tensorboard, enabled, step, seconds)


def choose(run: Preparation, model: GPT, progress: Progress) -> tuple[int, UserError | None]:
    """Returns the step whose weights the run ends with, and puts them into the model.

    If the best checkpoint is lost, returns the last step with an error: the caller saves those weights, then raises it.
    """
    best = progress.best
    if run.settings.validation.final == "last" or best is None or best[0] == progress.step or progress.exit_code:
        return progress.step, None
    try:
        copy_into(model, run.checkpoints.at(best[0]).tensors("delta"))
    except UserError as error:
        error.hint = f"final/ holds the weights of step {progress.step}, not the best of step {best[0]}"
        return progress.step, error
    return best[0], None


def template_facts(template: ChatTemplate, data: Data) -> dict[str, Any]:
    """Returns what delta.json says of the template; what is at its default is left out."""
    facts = {"name": template.name, "sha256": template.tokenizer.template_hash, "system": data.system}
    more = {"options": template.options or None, "thinking": data.thinking}
    more |= {"text_sha256": None if template.is_models_own else template.exported_hash}
    return facts | {key: value for key, value in more.items() if value not in (None, "error")}


def save(run: Preparation, model: GPT, progress: Progress, step: int, storage: Storage | None, first: bool) -> None:
    """Writes final/."""
    base, reads, chat = Path(run.settings.base.dir), run.facts["reads"], run.template
    facts = {
        "base": base_facts(base, storage, run.facts["base"], reads["config"], reads["tokenizer"]),
        "template": template_facts(chat, run.settings.data),
        "precision": run.precision.name,
        "step": step,
        "steps_done": progress.step,
        "steps_planned": max(run.steps, progress.step),  # fewer may be asked for than are done already
        "finished": not progress.exit_code and not progress.out_of_time,
    }
    if began := run.facts["init_from"]:
        facts["init_from"] = began
    save_result(Path(run.settings.out) / "final", model, run.name, run.method, base, facts, first, chat)
