"""Settings of the data set: its files, how rows become tokens, and which tokens are trained."""

from dataclasses import dataclass
from typing import Literal

from litpeft.core.kinds import check_choices, check_least
from litpeft.data.formats import FORMATS

Format = Literal[("auto", *FORMATS)]


@dataclass
class Data:
    """Rows to learn from, and rows to measure on."""

    path: str
    """A .json or .jsonl file, or a folder with train.* and, if you like, validation.* (or valid.*, val.*, dev.*)."""
    validation_path: str | None = None
    """File of held-out rows; default: what the folder holds, else a split of `path`."""
    validation_split: float = 0.05
    """Share of the rows that is held out when there is no file of held-out rows; 0 holds out none."""
    format: Format = "auto"
    """Shape of a row; auto: seen from its keys, which may differ from row to row."""
    template: Literal["auto", "model", "alpaca"] = "auto"
    """How turns become text: model (its own chat template), alpaca, or auto: the model's if it has one, else alpaca."""
    system: str | None = None
    """System message put before every row that has none."""
    mask_prompt: bool = True
    """Train on answers only; false trains on every token."""
    max_length: int = 2048
    """Longest row, in tokens; the model's own reach, where that is shorter."""
    overlong: Literal["error", "drop", "split"] = "error"
    """A row longer than max_length is an error, or is left out and listed in rejected.jsonl (drop), or cut (split)."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used is an error, or is left out (skip) and listed with its reason in rejected.jsonl."""
    packing: bool = True
    """Put several rows into one forward pass; attention never crosses rows, so only speed changes."""
    seed: int = 0
    """Seeds the split and the order of the rows in each epoch."""

    def __post_init__(self) -> None:
        check_choices(self, "data.")
        if not self.path:
            raise ValueError("data.path must be a .json or .jsonl file or a folder, got an empty string")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"data.validation_split must be at least 0 and below 1, got {self.validation_split}")
        check_least(self, "data.", max_length=2, seed=0)
