"""The report on a run: report.md, report.json, and the last lines in the terminal."""

import io
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from litpeft.core.errors import counted, scaled, some
from litpeft.core.terminal import clean
from litpeft.data.neutral import forgetting
from litpeft.train.log import duration
from litpeft.train.row_losses import KNOWN, SHOWN, RowLoss, RowLosses

SAMPLE_WIDTH = 112  # characters of a line of the samples' three columns
SAMPLE_LENGTH = 2000  # characters shown of one text of a sample


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, its row's answer, and the model's answers before and after training."""

    prompt: str
    expected: str
    before: str | None  # None: the run was too short to show both
    after: str


@dataclass(frozen=True)
class RunFacts:
    """The figures of a report."""

    title: str  # "lora on SmolLM2-135M-Instruct"
    command: str  # the command line that repeats the run
    method: str
    settings: dict[str, Any]  # the method's own keys
    base: str  # folder of the base model
    parameters: int  # of the base model
    precision: str  # "bf16-true", "bf16-true, linear layers in nf4"
    data: str  # the data set's report; any number of lines
    trainable: int  # trained parameters
    delta_bytes: int  # size of the result on disk
    steps: int
    epochs: float
    tokens: int
    trained_tokens: int
    seconds: float  # spent in optimizer steps
    total_seconds: float  # of the whole command, with start, validation and saving
    tokens_per_second: float  # over `seconds`
    device: str
    threads: int
    versions: dict[str, str]
    stopped: str  # why it ended: "all steps done", "max_time reached", "Ctrl-C at step 37"
    spent: dict[str, float] = field(default_factory=dict)  # seconds by what they were spent in
    peak_memory: int | None = None  # bytes; None if unknown
    first_loss: float | None = None  # mean training loss of the first 5 % of the steps, nats per token
    last_loss: float | None = None  # the same over the last 5 %
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss in nats per token), in order
    metric: str = "loss"  # what `best` is measured by: loss, exact, or preferred
    preference: str = ""  # the loss of pairs of answers, if they were compared; the losses above are then of it
    preferred: list[tuple[int, float, float]] = field(default_factory=list)  # (step, share of held-out pairs, margin)
    best: tuple[int, float] | None = None  # (step, value of the metric) of the best measurement after step 0
    samples: list[Sample] = field(default_factory=list)
    rows: RowLosses | None = None  # to train on, without and with what was learned
    neutral: tuple[float, float] | None = None  # loss on neutral text, likewise
    next_commands: list[str] = field(default_factory=list)
    init_from: str = ""  # the run or adapter that it began with
    go_on: str = ""  # the command that resumes a stopped run

    @property
    def unit(self) -> str:
        """What the losses are of."""
        return f"({self.preference})" if self.preference else "nats per token"

    @property
    def best_point(self) -> tuple[int, float] | None:
        """(step, loss) of the best measurement."""
        return next((point for point in self.validation if self.best and point[0] == self.best[0]), None)


def write_report(folder: Path, facts: RunFacts, steps: list[tuple[float, float, float]]) -> Path:
    """Writes report.md, report.json and, if the run made a step, loss.png into a run's folder; returns report.md.

    `steps` are the step, loss and lr of each step.
    """
    draw(folder, facts, steps)
    return write_texts(folder, facts, bool(steps))


def draw(folder: Path, facts: RunFacts, steps: list[tuple[float, float, float]]) -> None:
    """Writes loss.png, if the run made a step."""
    if steps:
        from litpeft.train.loss_figure import loss_figure  # imports matplotlib

        label = f"loss {facts.unit}" if facts.preference else f"loss ({facts.unit})"
        loss_figure(steps, facts.title, facts.validation, facts.best_point, label).savefig(Path(folder) / "loss.png")


def write_texts(folder: Path, facts: RunFacts, drawn: bool) -> Path:
    """Writes report.md and report.json; returns the first."""
    record = json.dumps(asdict(facts), indent=2, default=str)
    (Path(folder) / "report.json").write_text(record + "\n", encoding="utf-8")
    path = Path(folder) / "report.md"
    part = path.with_name(path.name + ".part")  # written atomically: it marks the end of the run
    part.write_text(markdown(facts, "loss.png" if drawn else None), encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path


def summary_lines(facts: RunFacts) -> list[str]:
    """Returns the last 4 to 8 lines in the terminal; those of a stopped run begin with the command to resume it."""
    lines = [f"to go on         {facts.go_on}"] if facts.go_on else []
    lines.append(f"{facts.title}: {facts.stopped}, {_work(facts)}")
    lines += [f"{name:<17}{figure}" for name, figure in _figures(facts).items()]
    lines += [f"next             {command}" for command in facts.next_commands[: 2 if facts.go_on else 3]]
    return [clean(line).replace("\n", " ") for line in lines]


def markdown(facts: RunFacts, picture: str | None) -> str:
    """Returns the report as Markdown."""
    parts = [f"# {_inline(facts.title)}"]
    if facts.go_on:
        parts += ["The run was stopped before its end. It goes on with", _fenced(facts.go_on, "sh")]
    parts.append(f"{_inline(facts.stopped)}: {_work(facts)}.")
    if picture:
        parts.append(f"![Training loss, validation loss and learning rate over the optimizer steps]({picture})")
    parts += ["## Figures", _table(facts)]
    if facts.rows is not None:
        parts += ["## Rows", *_row_losses(facts.rows)]
    if facts.samples:
        how = "with" if facts.samples[0].before is None else "without and with"
        parts += ["## Samples", f"Held-out prompts, answered {how} what was learned."]
        for number, sample in enumerate(facts.samples, start=1):
            parts += [f"### Sample {number}", _fenced(_cut(sample.prompt)), _fenced(_columns(sample))]
    values = {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in facts.settings.items()}
    settings = "\n".join(f"{key}: {value}" for key, value in values.items())
    parts += [f"## Settings of {_inline(facts.method)}", _fenced(settings or "(none)", "yaml")]
    parts += ["## Data", _fenced(facts.data)]
    if facts.next_commands:
        parts += ["## Go on", _fenced("\n".join(facts.next_commands), "sh")]
    parts += ["## Repeat this run", _fenced(facts.command, "sh")]
    return "\n\n".join(parts) + "\n"


def _figures(facts: RunFacts) -> dict[str, str]:
    """Returns the figures by name that both the terminal and the report show."""
    found = {}
    if facts.first_loss is not None:
        losses = f"{facts.first_loss:.3f} → {facts.last_loss:.3f} {facts.unit}"
        found["training loss"] = f"{losses} (first and last 5 % of the steps)"
    if facts.validation:
        found["validation loss"] = _validation(facts)
    if facts.preferred:
        first, last = facts.preferred[0], facts.preferred[-1]
        shares = f"{first[1]:.1%} → {last[1]:.1%} of the held-out pairs"
        found["preferred"] = f"{shares}, mean margin {first[2]:.4g} → {last[2]:.4g}"
    if facts.neutral is not None:
        found["forgetting"] = forgetting(*facts.neutral)
    if facts.rows is not None and facts.rows.suspects:
        named = some([row.source for row in facts.rows.suspects][:SHOWN])
        found["to look at"] = f"{counted(facts.rows.suspect_count, 'row')} far above the others: {named}; see rows.csv"
    share = f"{scaled(facts.trainable)} of {scaled(facts.parameters)} parameters"
    share += f" ({100 * facts.trainable / facts.parameters:.3g} %)"
    found["trained"] = f"{share}, {scaled(facts.delta_bytes, 'B')} on disk"
    if facts.spent:
        parts = (f"{name} {duration(seconds)}" for name, seconds in facts.spent.items() if seconds >= 0.05)
        found["time"] = f"{duration(facts.total_seconds)}: {', '.join(parts)}"
    memory = "" if facts.peak_memory is None else f", peak memory {scaled(facts.peak_memory, 'B')}"
    device = f"{facts.device} ({counted(facts.threads, 'thread')})"
    return found | {"used": f"{facts.tokens_per_second:,.0f} tokens/s{memory}, {device}"}


def _table(facts: RunFacts) -> str:
    rows = {name: _inline(figure) for name, figure in _figures(facts).items()} | {
        "tokens": f"{facts.tokens:,} read, {facts.trained_tokens:,} of them trained on",
        "base model": f"{_code(facts.base)}, {scaled(facts.parameters)} parameters, {_inline(facts.precision)}",
        "versions": _inline(", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    }
    rows |= {"began with": _code(facts.init_from)} if facts.init_from else {}
    return "\n".join(["| | |", "|---|---|", *(f"| {name.capitalize()} | {value} |" for name, value in rows.items())])


def _row_losses(rows: RowLosses) -> list[str]:
    """Returns paragraphs and tables on the rows that stand out."""
    count = f"all {rows.of:,}" if rows.measured == rows.of else f"{rows.measured:,} of the {rows.of:,}"
    chosen = "" if rows.measured == rows.of else ", chosen at random,"
    parts = [f"Losses of {count} rows to train on{chosen} in nats per token; rows\\.csv has each of them."]
    if rows.suspects:
        count = f"{counted(rows.suspect_count, 'row')} far above the others at the end: "
        parts += [count + "the answer may be wrong, or like no other.", _row_table(rows.suspects)]
    parts += ["The hardest at the end:", _row_table(rows.hardest)]
    if rows.known:
        count = f"{counted(rows.known_count, 'row')} known before, with a loss below {KNOWN} without what was learned: "
        parts += [count + "training on them taught nothing.", _row_table(rows.known)]
    return parts


def _row_table(rows: list[RowLoss]) -> str:
    lines = ["| row | before | after | asked | expected |", "|---|---|---|---|---|"]
    for row in rows:
        before = "" if row.before is None else f"{row.before:.3f}"
        asked, expected = _inline(row.asked), _inline(row.expected)
        lines.append(f"| {_code(row.source)} | {before} | {row.after:.3f} | {asked} | {expected} |")
    return "\n".join(lines)


def _work(facts: RunFacts) -> str:
    steps = counted(facts.steps, "step")
    epochs = f"{facts.epochs:.3g} epoch{'' if facts.epochs == 1 else 's'}"
    whole = f"{duration(facts.total_seconds)} with start, validation and saving"
    return f"{steps} ({epochs}) in {duration(facts.seconds)}; {whole}"


def _validation(facts: RunFacts) -> str:
    first, last = facts.validation[0][1], facts.validation[-1][1]
    text = f"{first:.3f} → {last:.3f} {facts.unit}" if len(facts.validation) > 1 else f"{first:.3f} {facts.unit}"
    if facts.best is None:
        return text
    step, value = facts.best
    if facts.metric != "loss":
        return f"{text}; most {facts.metric} answers {value:.1%} at step {step:,}"
    start = f", no better than the start's {first:.3f}" if facts.validation[0][0] == 0 and value >= first else ""
    return f"{text}, best {value:.3f} at step {step:,}{start}"


def _cut(text: str) -> str:
    rest = len(text) - SAMPLE_LENGTH
    return text if rest <= 0 else f"{text[:SAMPLE_LENGTH]} … ({rest:,} more characters)"


def _inline(text: str) -> str:
    """Returns `text` as one line of Markdown without mark-up."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(clean(text).split()))


def _ticks(text: str, least: int) -> str:
    """Returns a run of at least `least` backticks, longer than any in `text`."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _code(text: str) -> str:
    text = " ".join(clean(text).split())
    ticks = _ticks(text, 1)
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}".replace("|", "\\|")


def _fenced(text: str, language: str = "text") -> str:
    text = clean(text).strip("\n")
    fence = _ticks(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _columns(sample: Sample) -> str:
    """Returns the answers in wrapped columns of plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SQUARE, width=SAMPLE_WIDTH)
    texts = {"expected": sample.expected, "before": sample.before, "after": sample.after}
    texts = {name: text for name, text in texts.items() if text is not None}
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(_cut(clean(text).strip("\n"))) for text in texts.values()))
    file = io.StringIO()
    Console(file=file, width=SAMPLE_WIDTH, color_system=None, force_terminal=False).print(table)
    return file.getvalue()
