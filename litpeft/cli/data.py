"""The commands `litpeft data show`, `litpeft data check` and `litpeft data presets`."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from litpeft.core.errors import ConfigError, DataError, counted, quoted, some
from litpeft.core.folders import atomic_file
from litpeft.core.kinds import check_least
from litpeft.core.terminal import say
from litpeft.data.check import CHECKS, write_clean
from litpeft.data.check import check as checks_of
from litpeft.data.presets import PRESETS
from litpeft.data.prompts import new_file
from litpeft.data.rows import page, title
from litpeft.data.rows import show as text_of
from litpeft.data.settings import Data
from litpeft.data.sources import find
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.exchange.trained_rows import shape_of
from litpeft.model.families.read import read_config

MOST = 20  # bad rows that are told
ENDLESS = 1 << 40  # tokens: no row is too long


@dataclass
class Seen(Data):
    """Rows as a model sees them."""

    prefix: ClassVar[str] = ""
    streaming: ClassVar[bool] = False
    group_by_length: ClassVar[bool] = False
    window: ClassVar[int] = Data.window
    validation_split: float = 0.0
    """Share of the rows that is held out when there is no file of held-out rows."""
    bad_rows: Literal["error", "skip"] = "skip"
    """A row that cannot be used is an error, or is left out (skip) and listed."""
    pairs: bool = False
    """Read rows with a chosen and a rejected answer as pairs, as finetuning with preference.loss does."""
    model: str = field(kw_only=True)
    """Folder of the model or run whose tokenizer and chat template are used."""

    def load(self) -> tuple[DataSet, Tokenizer, int]:
        """Returns all rows, whole; the tokenizer; and the most tokens that a row may have."""
        run = find_run(Path(self.model))
        folder = Path(self.model) if run is None else run.model_folder() if run.is_model else run.base_folder(None)
        _, config = read_config(folder)
        if run is None:
            tokenizer = Tokenizer.load(folder)
            template = ChatTemplate(tokenizer, self.template, options=self.template_options, group=self.prefix)
        else:
            tokenizer, template = run.tokenizer_and_template(folder, self.template_options)
        sources, _ = find(self.path, self.validation_path, self.prefix)
        once = tuple(self.path) if isinstance(self.path, dict) else self.path  # a weight makes no duplicates
        whole = replace(self, path=once, max_length=ENDLESS, **shape_of(self, run, sources))
        data = load_dataset(whole, tokenizer, template, ENDLESS, pairs=self.pairs)
        return data, tokenizer, min(self.max_length, config.max_positions)


@dataclass
class Show(Seen):
    """Show rows as the model sees them: trained tokens in green, special tokens inverted."""

    first: int = 1
    """The first row that is shown, counted from 1."""
    count: int = 3
    """How many rows are shown."""
    line: int | None = None
    """Show the row that begins on this line, or is this row of a table, instead."""
    html: str | None = None
    """Write the rows as a page to this new file instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, first=1, count=1, line=1)


def show(settings: Show) -> None:
    """The command `litpeft data show`."""
    out = new_file(settings.html)
    data, tokenizer, _ = settings.load()
    rows = data.train[settings.first - 1 : settings.first - 1 + settings.count]
    if settings.line is not None:
        rows = [row for row in data.train if row.source.endswith(f":{settings.line}")]
        for bad in data.rejected:
            if bad.where.endswith(f":{settings.line}"):
                raise DataError(bad.reason, where=bad.where)
    if not rows:
        where = "first" if settings.line is None else "line"
        raise ConfigError(f"there is no such row: the data has {len(data.train):,}", where=where)
    if out is not None:
        with atomic_file(out) as handle:
            handle.write(page(rows, tokenizer))
        say(f"{counted(len(rows), 'row')}: {out}")
        return
    for row in rows:
        say(title(row))
        say(text_of(row, tokenizer, color=sys.stdout.isatty()), colored=True)
    for bad in data.rejected[:MOST]:
        say(f"{bad.where} cannot be used: {bad.reason}")
    if thoughts := str(data.report.thoughts):
        say(f"thinking: {thoughts}")


@dataclass
class Check(Seen):
    """Check rows before a model learns them; the exit code is 3 if a check fails."""

    limits: dict[str, float] = field(default_factory=dict)
    """Share of the rows at which a check fails, where it is to differ: {"duplicate": 0.01, "near_duplicate": 0.05}."""
    json: str | None = None
    """Write all figures, and every row that something is wrong with, to this new file."""
    fix: str | None = None
    """Write the rows that no check is about to this new .jsonl file, and the others with reasons beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name in self.limits if name not in CHECKS]
        if wrong:
            raise ValueError(f"limits are of {', '.join(CHECKS)}; got {some(wrong)}")
        if not all(0 <= limit <= 1 for limit in self.limits.values()):
            raise ValueError(f"limits must be between 0 and 1, got {self.limits}")


def check(settings: Check) -> None:
    """The command `litpeft data check`."""
    written, clean = new_file(settings.json), new_file(settings.fix, ".jsonl")
    data, tokenizer, longest = settings.load()
    checked = checks_of(data, settings.named, longest, tokenizer, settings.limits)
    say(str(checked))
    if thoughts := str(data.report.thoughts):
        say(f"\nthinking    {thoughts}")
    if written is not None:
        with atomic_file(written) as handle:
            json.dump(checked.json(), handle, ensure_ascii=False, indent=1)
    failed = [one.name for one in checked.findings if one.failed]
    if clean is not None:
        sources, _ = find(settings.path, settings.validation_path, settings.prefix)
        kept, left = write_clean(clean, sources, settings.documents, checked)
        say(f"\n{counted(kept, 'row')}: {clean}")
        say(f"{counted(left, 'row')} with their reasons: {clean.with_suffix('.rejected.jsonl')}")
    elif failed:
        hint = "--fix NEW.jsonl writes the others to a file; --limits says how many are good enough"
        raise DataError(f"{len(failed)} of {len(checked.findings)} checks failed: {', '.join(failed)}", hint=hint)


@dataclass
class Presets:
    """List the well-known data sets that `data.path` takes by name, or show one of them."""

    name: str | None = None
    """The set to show: where it comes from, its licence, and a row."""

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {quoted(self.name)}")


def presets(settings: Presets) -> None:
    """The command `litpeft data presets`."""
    if settings.name is not None:
        one = PRESETS[settings.name]
        lines = {"source": one.source, "licence": one.licence, "about": one.about, "row": json.dumps(one.row)}
        lines |= {"columns": json.dumps(one.columns)} if one.columns else {}
        say("\n".join(f"{key:<8} {value}" for key, value in lines.items()))
        return
    for name, one in PRESETS.items():
        say(f"{name:<15} {one.about}\n{'':<15} {one.source}, licence: {one.licence}")
