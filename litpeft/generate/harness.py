"""`litpeft evaluate MODEL --tasks NAMES`: tasks of lm-evaluation-harness on a model, or a run and its base.

The harness reads the tasks, writes their prompts and computes the metrics, https://github.com/EleutherAI/lm-evaluation-harness;
the model is ours. Import this module only where lm_eval is installed.
"""

import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from litpeft.core.errors import ConfigError, DataError, ResourceError, UserError, brief, counted, nearest
from litpeft.core.folders import atomic_file
from litpeft.core.memory import out_of_memory
from litpeft.core.terminal import say, tell
from litpeft.data.prompts import new_file
from litpeft.generate.load import Loaded, as_base, load_measured, load_one, named
from litpeft.generate.settings import Evaluate
from litpeft.generate.tasks import TaskModel

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "shots": 1234}  # the harness's own defaults
RESAMPLES = 1000  # for the standard error of a metric that has no formula for it, such as a perplexity
KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
Tasks = dict[str, Any]  # what TaskManager.load returns
Results = dict[str, Any]  # of one model, as the harness gives them


class HarnessModel(TaskModel, LM):
    """Our model as the harness knows models."""

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.template.hash  # of the prompts that the harness could keep, which we do not let it


def evaluate_tasks(settings: Evaluate) -> None:
    """The command, where tasks are named."""
    output = new_file(settings.output, ".json" if str(settings.output).endswith(".json") else ".jsonl")
    names = named(settings)
    with quiet():
        tasks = load_tasks(settings)
        results = dict(measured(settings, tasks, names))
    say(table(results, tasks))
    if output is not None:
        with atomic_file(output) as handle:
            for record in [without_samples(results)] if output.suffix == ".json" else documents(results):
                handle.write(json.dumps(record, ensure_ascii=False, default=str, indent=None) + "\n")


def measured(settings: Evaluate, tasks: Tasks, names: Mapping[str, str]) -> Iterator[tuple[str, Results]]:
    """Yields the results of each model by its name; before those of the first, if it is a run, its base's."""
    loaded = load_measured(settings)
    own = next(iter(names)) if len(names) > 1 else "finetuned" if loaded.run else "model"
    found = results_of(own, loaded, settings, tasks)
    if loaded.run and settings.compare_base:
        with as_base(loaded, settings):
            yield "base", results_of("base", loaded, settings, tasks)
    yield own, found
    for name, path in list(names.items())[1:]:
        one = replace(settings, model=path, method={})
        yield name, results_of(name, load_one(one, path), one, tasks)


def results_of(name: str, loaded: Loaded, settings: Evaluate, tasks: Tasks) -> Results:
    """Returns a model's results on the tasks. Each model gets the same shots."""
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEEDS["shots"])
    tell(f"{name}: {counted(len(tasks['tasks']), 'task')}")
    model = HarnessModel(loaded, settings.batch_size, settings.as_chat)
    try:
        found = evaluate(
            model,
            tasks,
            limit=settings.max_rows,
            bootstrap_iters=RESAMPLES,
            system_instruction=loaded.system if settings.as_chat else None,
            apply_chat_template=settings.as_chat,
            fewshot_as_multiturn=settings.as_chat,
        )
    except Exception as error:
        if isinstance(error, UserError | OSError) or out_of_memory(error):
            raise
        raise failed("the tasks cannot be measured", error) from error
    asked = {"max_rows": settings.max_rows, "as_chat": settings.as_chat, "seeds": SEEDS, "resamples": RESAMPLES}
    model = {"folder": settings.model, "precision": settings.precision, "quantize": settings.quantize}
    return {**found, "config": {"model": model, **asked}, "lm_eval_version": lm_eval.__version__}


def load_tasks(settings: Evaluate) -> Tasks:
    """Returns the tasks that the settings name, with their data."""
    wanted = [name for text in settings.tasks for name in text.split(",") if name]
    folder = settings.task_folder
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"there is no folder {folder}", where="task_folder")
    manager = TaskManager(include_path=folder, include_defaults=False)
    names = found_in(manager, wanted)
    if not all(names.values()):  # to index the harness's own takes seconds
        manager = TaskManager(include_path=folder)
        names = found_in(manager, wanted)
    for name, found in names.items():
        if not found:
            near = nearest(name, list(manager.all_tasks))
            hint = "`lm-eval ls tasks` lists them; --task_folder names a folder of your own"
            raise ConfigError(f'there is no task "{name}"{near}', where="tasks", hint=hint)
    tasks: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(one for found in names.values() for one in found):
        entry = manager.task_index.get(name)
        if entry is not None and entry.cfg and entry.cfg.get("unsafe_code"):
            raise unsafe(name)
        tell(f"reading the task {name}")
        for key, part in load_task(manager, name).items():
            tasks[key] |= part
    for name, task in tasks["tasks"].items():
        check(name, task)
        set_shots(name, task, settings.shots)
    return tasks


def found_in(manager: TaskManager, wanted: list[str]) -> dict[str, list[str]]:
    """Returns the tasks, groups and files that each wanted name, pattern or path stands for."""
    index = manager.task_index

    def found(name: str) -> list[str]:
        if name in index or (Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()):
            return [name]
        return sorted(one for one in index if fnmatchcase(one, name)) if set("*?[") & set(name) else []

    return {name: found(name) for name in wanted}


def load_task(manager: TaskManager, name: str) -> Tasks:
    """Returns one task, or a group of them."""
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        what = f'the task "{name}" needs the package {error.name}, which is not installed'
        raise DataError(what, hint=f"pip install {error.name}, or 'lm_eval[tasks]' for all tasks") from None
    except Exception as error:
        if unreachable(error):
            what = f'the data set of the task "{name}" cannot be fetched: {first_line(error)}'
            hint = "connect to huggingface.co, which is needed once; or write a task over a file of your own"
            raise ResourceError(what, hint=hint) from None
        raise failed(f'the task "{name}" cannot be read', error) from error


def unreachable(error: BaseException | None) -> bool:
    """Returns whether an error comes of a network that is not there."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or "Offline" in type(error).__name__:
            return True
        if "Couldn't reach" in str(error) or type(error).__name__ == "ConnectError":
            return True
        error = error.__cause__ or error.__context__
    return False


def failed(what: str, error: Exception) -> DataError:
    """Returns the error of something that the harness, or a task's own code, could not do."""
    return DataError(f"{what}: {type(error).__name__}: {first_line(error)}", hint="--debug shows where")


def first_line(error: Exception) -> str:
    return brief(next(iter(str(error).strip().splitlines()), ""))


def unsafe(name: str) -> ConfigError:
    hint = "start `litpeft serve`, and measure with lm_eval itself, on a machine that may run such code"
    return ConfigError(f'the task "{name}" runs code that the model writes', where="tasks", hint=hint)


def check(name: str, task: Task) -> None:
    """Raises ConfigError for a task that our models cannot be asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise unsafe(name)
    if getattr(task, "MULTIMODAL", False) or task.OUTPUT_TYPE not in KINDS:
        what = "pictures or sound" if getattr(task, "MULTIMODAL", False) else f"output_type {task.OUTPUT_TYPE}"
        raise ConfigError(f'the task "{name}" has {what}, which litpeft does not', where="tasks")


def set_shots(name: str, task: Task, shots: int | None) -> None:
    """Sets how many examples begin each prompt of a task, as the harness does: one that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if shots is None or own == 0:
        if shots:
            tell(f"{name} is measured without shots, as it says itself")
        shots = own or 0
    task.set_config(key="num_fewshot", value=shots)


@contextmanager
def quiet() -> Iterator[None]:
    """Lets the harness and the libraries that it uses print nothing, nor ask the terminal about bars."""
    datasets.disable_progress_bars()
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    silent = partialmethod(tqdm.__init__, disable=True)
    # the workers that compute standard errors would be forks of a process with threads
    with (
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(),
        patch.object(tqdm, "__init__", silent),
        patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}),
        redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


def table(results: Mapping[str, Results], tasks: Tasks) -> str:
    """Returns the metrics of the models side by side, with their standard errors."""
    first, *_ = results.values()
    rows: list[tuple[str, list[str]]] = [("", list(results))]
    for name in [*tasks["groups"], *tasks["tasks"]]:
        values = first["results"].get(name) or first.get("groups", {}).get(name) or {}
        metrics = [key for key in values if "," in key and not key.partition(",")[0].endswith("_stderr")]
        if not metrics:
            continue
        shots, sizes = first["n-shot"].get(name), first["n-samples"].get(name)
        size = [] if sizes is None else [counted(sizes["effective"], "document"), counted(shots or 0, "shot")]
        rows.append((", ".join([values.get("alias") or name, *size]), []))
        for key in metrics:
            metric, _, chosen = key.partition(",")
            label = metric if chosen == "none" else f"{metric}, {chosen}"
            rows.append((f"  {label}", [figure(one["results"].get(name, values), key) for one in results.values()]))
    width = max(22, *(len(label) for label, cells in rows if cells))
    wide = max(18, *(len(cell) + 2 for _, cells in rows for cell in cells))
    lines = (f"{label:<{width}}" + "".join(f"{cell:>{wide}}" for cell in cells) for label, cells in rows)
    return "\n".join(map(str.rstrip, lines))


def figure(values: Mapping[str, Any], key: str) -> str:
    """Returns a metric with its standard error."""
    metric, _, chosen = key.partition(",")
    value, error = values[key], values.get(f"{metric}_stderr,{chosen}")
    parts = [value, error] if isinstance(error, float) else [value]
    return " ± ".join(f"{one:.{4 if abs(one) < 1e4 else 0}f}" if isinstance(one, float) else str(one) for one in parts)


def without_samples(results: Mapping[str, Results]) -> dict[str, Results]:
    """Returns the results of each model, without its documents."""
    return {name: {key: part for key, part in one.items() if key != "samples"} for name, one in results.items()}


def documents(results: Mapping[str, Results]) -> Iterator[dict[str, Any]]:
    """Yields every document that was measured, with each model's answers and metrics."""
    first, *_ = results.values()
    for task, samples in first["samples"].items():
        for at, sample in enumerate(samples):
            record = {"task": task, **{key: sample[key] for key in ("doc_id", "filter", "doc", "target", "arguments")}}
            for name, one in results.items():
                its = one["samples"][task][at]
                metrics = {key: its[key] for key in its["metrics"]}
                record[name] = {"resps": its["resps"], "filtered_resps": its["filtered_resps"], **metrics}
            yield record
