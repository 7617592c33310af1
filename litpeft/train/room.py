"""The room on disk that a run needs."""

from pathlib import Path

from litpeft.core.place import check_disk
from litpeft.core.precision import Precision
from litpeft.core.terminal import is_first
from litpeft.model.delta import Method, delta_state, trainable, training_state
from litpeft.model.gpt import GPT
from litpeft.train.settings import Finetune


def check_room(
    settings: Finetune, method: Method, shapes: GPT, precision: Precision, held_out: bool, resumes: bool
) -> None:
    """Raises if the disk has no room for what the run will write."""
    if not is_first():
        return
    dtype = method.trained_dtype(precision.weights)
    trained = dtype.itemsize * sum(p.numel() for p in trainable(shapes).values())
    state = sum(tensor.nbytes for tensor in training_state(shapes).values())
    held = dtype.itemsize * sum(tensor.numel() for tensor in delta_state(shapes).values())
    result = held if method.writes_model else 2 * held  # final/ says it for peft, too
    needed = bytes_needed(settings, 2 * trained + held + state, result, held_out, resumes)
    hint = "make room, set `out` to another disk, lower checkpoint.keep_last, or train less (a smaller method.rank)"
    check_disk(Path(settings.out), needed, "the checkpoints", hint)


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
