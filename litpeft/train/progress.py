"""The progress of a run, which a checkpoint holds beside its tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from litpeft.core.typed import typed
from litpeft.train.report import Sample


@dataclass
class Progress:
    """Counters and results of a run so far; a checkpoint holds them as JSON."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in optimizer steps
    startup: float = 0.0  # seconds before the first step, summed over all commands of the run
    reading: float = 0.0  # of these, spent in reading rows
    measuring: float = 0.0  # seconds spent with held-out rows
    saving: float = 0.0  # in checkpoints and the result
    ending: float = 0.0  # in what is measured at the end, and the report
    elapsed: float = 0.0  # seconds since the run began, without the time between a stop and its resume
    still: int = 0  # most recent steps in a row whose gradient was exactly 0
    losses: list[float] = field(default_factory=list)  # of each step, nats per trained token
    validations: list[tuple[int, float]] = field(default_factory=list)  # step, nats per trained token
    preferred: list[tuple[int, float, float]] = field(default_factory=list)  # of pairs: step, share, mean margin
    best: tuple[int, float] | None = None  # step and value of the metric
    waited: int = 0  # measurements since the best
    windows: list[list[int]] = field(default_factory=list)  # with data.streaming: by epoch, the rows of each
    samples: list[Sample] = field(default_factory=list)
    sampled: int | None = None  # the step of the last samples
    before_rows: list[tuple[int, float]] = field(default_factory=list)  # row, its loss before training: see ending.py
    before_neutral: tuple[int, float] | None = None  # number of neutral texts, their loss before training
    stopped: str = ""
    out_of_time: bool = False
    exit_code: int = 0

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Progress":
        """Returns the progress of a checkpoint's JSON, with nothing left of why the run stopped."""
        return typed(cls, asdict(cls()) | record | {"stopped": "", "out_of_time": False, "exit_code": 0}, "progress")
