"""Settings of the data set: its files, how rows become tokens, and which tokens are trained."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from litpeft.core.kinds import check_choices, check_least
from litpeft.core.typed import LATER
from litpeft.data.builtin import BUILT_IN
from litpeft.data.formats import FORMATS
from litpeft.data.formats.columns import mapped
from litpeft.data.readers.text import Documents

Format = Literal[("auto", *FORMATS)]
Thinking = Literal["error", "keep", "drop"]


@dataclass
class Data:
    """Rows to learn from, and rows to measure on."""

    prefix: ClassVar[str] = "data."  # of its keys, as they are typed
    path: dict[str, float] | tuple[str, ...] | str
    """A file; a folder with train.* and, if you like, validation.*; a glob; `-` (standard input, JSON or JSON Lines);
    hf://ORG/NAME, a data set of the hub; a well-known one by its name (`litpeft data presets`); a list of these; or
    weights: {"a.csv": 2, "b/*.jsonl": 0.5} shows each row of a twice an epoch, half of b's once."""
    validation_path: str | None = None
    """File of held-out rows, or a glob; default: what the folder holds, else a split of `path`."""
    validation_split: float = 0.05
    """Share of the rows that is held out when there is no file of held-out rows; 0 holds out none."""
    format: Format = "auto"
    """Shape of a row; auto: seen from its keys, which may differ from row to row."""
    columns: dict[str, str] | None = field(default=None, metadata=LATER)
    """Columns of your own: {"user": "question", "assistant": "{answer}, says {author}"}; also system, input,
    thinking and weight; or messages; or text."""
    documents: Documents = field(default="file", metadata=LATER)
    """What is one document in a .txt file."""
    template: Literal[("auto", "model", *BUILT_IN)] = "auto"
    """How turns become text: model (its own chat template), a well-known one by name, or auto: the model's if it has
    one, else alpaca."""
    template_options: dict[str, Any] | None = field(default=None, metadata=LATER)
    """What the model's template may be told, such as {"enable_thinking": false} or {"reasoning_effort": "high"}."""
    thinking: Thinking = field(default="error", metadata=LATER)
    """Thoughts before an answer that the template leaves out: the row is an error; or each answer becomes a row of its
    own, thoughts and all (keep); or they are left out (drop)."""
    system: str | None = None
    """System message put before every row that has none."""
    mask_prompt: bool = True
    """Train on answers only; false trains on every token."""
    max_length: int = 2048
    """Longest row, in tokens; the model's own reach, where that is shorter."""
    overlong: Literal["error", "drop", "split"] = "error"
    """A row longer than max_length is an error, or is left out and listed in rejected.jsonl (drop), or cut (split);
    plain text is cut, except with drop."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used is an error, or is left out (skip) and listed with its reason in rejected.jsonl."""
    packing: bool = True
    """Put several rows into one forward pass; attention never crosses rows, so only speed changes."""
    group_by_length: bool = field(default=False, metadata=LATER)
    """Without data.packing: steps of rows of about the same length, in a random order of the steps."""
    seed: int = 0
    """Seeds the split and the order of the rows in each epoch."""
    streaming: bool = field(default=False, metadata=LATER)
    """Read, render and tokenise the rows while the run trains, window by window, instead of before it; they begin again
    until train.max_steps is reached. Held-out rows come from files of their own."""
    window: int = field(default=10_000, metadata=LATER)
    """With data.streaming: rows that are shuffled together; the files give them in their order."""
    cache: bool = field(default=True, metadata=LATER)
    """Keep the tokens of 1,000 rows and more in ~/.cache/litpeft/rows, at most 10 GiB there; the next start reads them
    from there, unless a file, the tokenizer, the template, a setting or litpeft's code has changed."""

    def __post_init__(self) -> None:
        check_choices(self, self.prefix)
        if not self.path or not all([self.path] if isinstance(self.path, str) else self.path):
            raise ValueError(f"{self.prefix}path must name a file or a folder, got an empty string")
        if isinstance(self.path, dict) and not all(0 < weight <= 1000 for weight in self.path.values()):
            what = f"{self.prefix}path has weights, which must be above 0 and at most 1000, got {self.path}"
            raise ValueError(f"{what}; they say how often rows are shown, the weight of a row how much it counts")
        check_columns(self, self.prefix)
        if not 0 <= self.validation_split < 1:
            raise ValueError(
                f"{self.prefix}validation_split must be at least 0 and below 1, got {self.validation_split}"
            )
        check_least(self, self.prefix, max_length=2, seed=0, window=1)
        if self.streaming and isinstance(self.path, dict):
            raise ValueError(f"{self.prefix}streaming takes no weights in {self.prefix}path: name a list of files")
        if self.group_by_length and (self.packing or self.streaming):
            raise ValueError(f"{self.prefix}group_by_length is used only with packing false and streaming false")
        if not self.streaming and self.window != Data.window:
            raise ValueError(f"{self.prefix}window is used only with {self.prefix}streaming true")

    @property
    def named(self) -> str:
        """Returns the paths of the rows to train on, for messages."""
        return ", ".join([self.path] if isinstance(self.path, str) else self.path)

    @property
    def paths(self) -> list[str]:
        """Returns all paths of the settings."""
        named = [self.path] if isinstance(self.path, str) else list(self.path)
        return [*named, *([self.validation_path] if self.validation_path else [])]


def check_columns(settings: Any, group: str = "") -> None:
    """Raises ValueError for a mapping of columns that is wrong, or given beside a format."""
    if settings.columns is not None:
        mapped(settings.columns, f"{group}columns")
        if settings.format != "auto":
            raise ValueError(f"{group}columns and {group}format exclude each other: columns say the shape of a row")
