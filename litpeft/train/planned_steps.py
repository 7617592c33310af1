"""The rows of each optimizer step of a run, from where it is to its end."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from litpeft.core.errors import DataError, UserError
from litpeft.data.batches import plan_epoch
from litpeft.data.rows import Row
from litpeft.data.streaming import Stream
from litpeft.train.preparation import Preparation
from litpeft.train.progress import Progress
from litpeft.train.rejected import add_rejected

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric


def planned_steps(
    run: Preparation, progress: Progress, fabric: "Fabric", keep: Callable[[], None]
) -> Iterator[list[Row]]:
    """Yields the rows of each optimizer step that is still to be done; `keep` saves what was learned so far."""
    if run.stream is not None:
        yield from _streamed(run.stream, run, progress, fabric, keep)
        return
    settings, rows, seen = run.settings, run.rows.train, 0
    for epoch in range(settings.train.epochs):
        progress.epoch = epoch
        lengths = rows.column("tokens") if settings.data.group_by_length else None
        plan = plan_epoch(len(rows), settings.train.batch_size, epoch, settings.data.seed, lengths)
        todo = range(len(plan))[max(0, progress.step - seen) : run.steps - seen]
        yield from ([rows[i] for i in plan[step]] for step in todo)
        seen += len(plan)
        if seen >= run.steps:
            return


def _streamed(
    stream: Stream, run: Preparation, progress: Progress, fabric: "Fabric", keep: Callable[[], None]
) -> Iterator[list[Row]]:
    """Yields the same of a stream, whose files may hold an error that nobody has seen yet."""
    told = len(run.rows.rejected)
    with closing(stream.steps(run.settings.train.batch_size, progress.step, progress.windows)) as steps:
        while progress.step < run.steps:
            try:
                progress.epoch, rows = next(steps)
            except UserError as error:
                if progress.step and (isinstance(error, DataError) or fabric.world_size == 1):  # all ranks meet it
                    keep()
                    error.hint = "; ".join(filter(None, (error.hint, going_on(progress.step))))
                raise
            if len(run.rows.rejected) > told and fabric.is_global_zero:
                add_rejected(run)
            told = len(run.rows.rejected)
            yield rows


def going_on(step: int) -> str:
    """Returns how a run goes on whose stream met an error."""
    changed = "--resume_changed '[\"data.*\"]'"
    return f"step {step} is saved, and --resume true goes on from there, with {changed} if settings of the data change"
