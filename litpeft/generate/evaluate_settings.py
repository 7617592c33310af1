"""Settings of `litpeft evaluate`."""

from dataclasses import dataclass

from litpeft.core.kinds import check_choices, check_least
from litpeft.data.settings import Format
from litpeft.generate.settings import Precision, Quantize


@dataclass
class Evaluate:
    """Measure a model on rows with known answers: loss over their tokens, and answers that match exactly."""

    model: str
    """A base folder, a run, or a merged folder."""
    data: str
    """A .json or .jsonl file of rows, or a folder with validation.*."""
    format: Format = "auto"
    """Shape of a row; auto: seen from its keys, which may differ from row to row."""
    base: str | None = None
    """Folder of the base model, if it has moved since the run."""
    precision: Precision = "auto"
    """Type of weights and activations; auto: bf16-true where the device has it, else 32-true."""
    quantize: Quantize = None
    """Hold a model's linear layers in 4 or 8 bits a weight; a run's base is held as the run held it."""
    compare_base: bool = True
    """For a run: measure its base too, and show both side by side."""
    max_rows: int | None = None
    """Measure on the first so many rows only."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Rows answered at once."""
    samples: int = 2
    """Rows whose answers are shown."""
    output: str | None = None
    """Write every row's answers and scores here, as .jsonl."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, max_rows=1, max_new_tokens=1, batch_size=1, samples=0)
