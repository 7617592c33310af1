"""The rows of a run: read, counted and looked over before anything is trained."""

import json

from litpeft.core.errors import ConfigError
from litpeft.core.terminal import command_line, is_first, say
from litpeft.data.batches import lay_out, padding, plan_epoch
from litpeft.data.readers import STDIN
from litpeft.data.short_check import concerns
from litpeft.data.sources import pinned
from litpeft.data.streaming import Stream, load_stream
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.model.objective import MICRO_TOKENS
from litpeft.train.budget import Budget, fitting_warmup
from litpeft.train.optim import total_steps
from litpeft.train.settings import Finetune

ALONE = "warning: with train.batch_size 1 a step is one row, whose own weight cancels out; its messages' still count"


def pin_rows(settings: Finetune) -> None:
    """Names the commits that sets of the hub have now in the settings, so that the run can be repeated."""
    data = settings.data
    if STDIN in data.paths and settings.devices * settings.num_nodes > 1:
        what = "only one process can read standard input"
        raise ConfigError(what, where="data.path", hint="write the rows to a file, or train on one device")
    data.path = pinned(data.path)
    if data.validation_path:
        data.validation_path = pinned(data.validation_path)


def read_rows(settings: Finetune, template: ChatTemplate, reach: int) -> tuple[DataSet, Stream | None, int]:
    """Returns the rows, their stream if they are streamed, and the steps of the run; says what became of the files.

    `reach` is how many tokens of a row the model can read.
    """
    if settings.data.streaming:
        rows, stream = load_stream(settings.data, template, reach)
        steps = settings.train.max_steps
    else:
        pairs = settings.preference.loss is not None
        rows, stream = load_dataset(settings.data, template.tokenizer, template, reach, pairs=pairs), None
        steps = total_steps(len(rows.train), settings.train)
    say(str(rows.report))
    if rows.report.weights.rows and settings.train.batch_size == 1:
        say(ALONE)
    if settings.check_rows:
        check_rows(settings, rows, template.tokenizer)
    if settings.data.group_by_length:
        say(grouped(settings, rows))
    if stream is not None and settings.data.packing:
        say(packed(settings, rows))
    return rows, stream, steps


def fitting_budget(settings: Finetune, rows: DataSet, steps: int) -> Budget:
    """Returns when is measured; says where that, or the warmup, is less than the settings or their defaults say."""
    if (warmup := fitting_warmup(settings.train.warmup_steps, steps)) < settings.train.warmup_steps:
        say(f"train.warmup_steps {settings.train.warmup_steps} are more than a quarter of the run; {warmup} are taken")
    held_out = rows.validation[: settings.validation.max_rows]
    budget = Budget.of(settings, rows.train.column("tokens"), held_out, steps)
    if note := budget.note(len(held_out), settings.validation):
        say(note)
    return budget


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


def grouped(settings: Finetune, rows: DataSet) -> str:
    """Returns a line on what padding would cost with and without rows grouped by length."""
    train, lengths = settings.train, rows.train.column("tokens")
    plans = (plan_epoch(len(lengths), train.batch_size, 0, settings.data.seed, given) for given in (lengths, None))
    with_groups, without = (f"{padding(plan, lengths, train.micro_batch_size):.1%}" for plan in plans)
    return f"by length   padding would be {with_groups} of the passes, {without} in random order; nothing is padded"


def packed(settings: Finetune, rows: DataSet) -> str:
    """Returns a line on how full the passes are that a stream's first window makes."""
    train, lengths = settings.train, rows.train.column("tokens")
    room = MICRO_TOKENS if train.micro_tokens == "auto" else train.micro_tokens
    passes = []
    for start in range(0, len(lengths), train.batch_size):
        step = lengths[start : start + train.batch_size].tolist()
        layout = lay_out(range(len(step)), step, settings.devices * settings.num_nodes, room, None)
        passes += [sum(step[i] for i in micro) for share in layout for micro in share if micro]
    fill = sum(passes) / sum(max(room, tokens) for tokens in passes)
    told = f"the steps of the first window fill {fill:.1%} of passes of {room:,} tokens (train.micro_tokens)"
    return f"packing     {told}; nothing is padded"
