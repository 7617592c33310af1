"""The command `litpeft compare`: trains several runs one after the other and sets what they learned side by side."""

import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from litpeft.cli import COMMANDS, parse
from litpeft.core.errors import ConfigError, UserError, counted, scaled
from litpeft.core.json import read_json, write_json
from litpeft.core.kinds import check_least
from litpeft.core.terminal import say, tell
from litpeft.data.sources import find
from litpeft.methods import METHODS

COLUMNS = {  # of the table: what each cell is made of
    "run": lambda row: row.name,
    "trains": lambda row: f"{row.trainable:,}" if row.trainable else "",
    "result": lambda row: scaled(row.delta_bytes, "B") if row.trainable else "",
    "steps": lambda row: f"{row.steps}" if row.trainable else "",
    "in steps": lambda row: f"{row.seconds:.0f} s" if row.trainable else "",
    "peak memory": lambda row: scaled(row.peak_memory, "B") if row.peak_memory else "",
    "loss": lambda row: f"{row.loss:.3f}",
    "exact answers": lambda row: row.score,
    "answers": lambda row: f"{row.tokens_per_second:.0f} tokens/s",
}


@dataclass
class Compare:
    """Train several runs on the same rows for as many steps, and set what they learned side by side."""

    out: str
    """Folder of the comparison; each run has a folder in it. Runs that it holds already are not trained again."""
    common: dict[str, Any]
    """Keys of `litpeft finetune` for all runs: base, data, train, ..."""
    runs: dict[str, Any]
    """The runs by name, each with keys of `litpeft finetune` of its own, {} for none; its method is its name, or
    `use`, e.g. {"lora": {}, "lora_r32": {"use": "lora", "method": {"rank": 32}}}."""
    steps: int | None = None
    """Optimizer steps of each run; null: as many as its own keys and defaults say."""
    measured: str | None = None
    """File of rows to measure on; default: the held-out rows of common.data."""
    shots: int = 0
    """Measure the base, too, with so many of the rows in each prompt."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Rows answered at once."""

    def __post_init__(self) -> None:
        check_least(self, steps=1, shots=0, max_new_tokens=1, batch_size=1)
        if not self.runs:
            raise ValueError("runs must name at least one run")
        for name, keys in self.runs.items():
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(f"runs: {name!r} is no name of a folder: use letters, digits, -, _ and .")
            if name == "base":
                raise ValueError("runs: base is the row of the model without a run; call the run otherwise")
            if not isinstance(keys, dict):
                raise ValueError(f"runs.{name} must be keys and values, {{}} for none")
            if keys.get("use", name) not in METHODS:
                raise ValueError(f"runs.{name}: its method must be one of {', '.join(METHODS)}; say which with `use`")


@dataclass
class Row:
    """The figures of one run, or of the base."""

    name: str
    loss: float  # nats per token, on the measured rows
    score: str  # exact answers
    tokens_per_second: float  # of the answers
    method: str = ""
    trainable: int = 0
    delta_bytes: int = 0
    steps: int = 0
    seconds: float = 0.0  # in optimizer steps
    peak_memory: int | None = None  # of training, in bytes
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)


REPORT = "report of a run"
TRAINED = ("method", "trainable", "delta_bytes", "steps", "seconds", "peak_memory", "validation")  # from the report


def compare(settings: Compare) -> None:
    """The command. Each run is trained by a process of its own, so that its peak memory is its own."""
    from litpeft.generate.evaluate import measure
    from litpeft.generate.settings import Evaluate

    out = Path(settings.out)
    files = {name: write_config(settings, name) for name in settings.runs}
    parsed = {name: checked(settings, name, file) for name, file in files.items()}
    first = next(iter(parsed.values()))
    held_out = find(first.data.path, first.data.validation_path)[1]
    named = str(held_out[0]) if len(held_out) == 1 else first.data.validation_path or (held_out and first.data.path)
    rows_file = settings.measured or named
    if not rows_file or not isinstance(rows_file, str):
        raise ConfigError("there is no file of held-out rows", where="measured", hint="name one")

    def figures(name: str, model: str, shots: int = 0) -> Row:
        shared = {
            "columns": first.data.columns,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "samples": 0,
        }
        source = str(find(first.data.path, None)[0][0]) if shots else None
        asked = Evaluate(model, rows_file, compare_base=False, shots=shots, shots_from=source, **shared)
        (score,) = measure(asked)[1]
        return Row(name, score.loss, score.share, score.tokens_per_second)

    table = [figures("base", first.base.dir)]
    if settings.shots:
        table.append(figures(f"base, {counted(settings.shots, 'shot')}", first.base.dir, settings.shots))
    codes: dict[str, int] = {}
    for name, file in files.items():
        codes[name] = train(settings.runs[name].get("use", name), file, out / name)
        if codes[name]:
            continue
        facts = read_json(out / name / "report.json", REPORT)
        row = replace(figures(name, str(out / name)), **{key: facts[key] for key in TRAINED})
        table.append(row)
        tell(f"{name}: {row.score} exact answers, loss {row.loss:.3f}")
    write(out, table)
    if failed := {name: code for name, code in codes.items() if code}:
        error = UserError(f"{counted(len(failed), 'run')} failed: {', '.join(failed)}", where=out)
        error.exit_code = max(failed.values())
        raise error


def write_config(settings: Compare, name: str) -> Path:
    """Writes the keys of a run to a file for `--config`, unless it holds them already."""
    keys = merged(settings.common, {key: value for key, value in settings.runs[name].items() if key != "use"})
    if settings.steps is not None:  # epochs enough for them
        keys = merged(keys, {"train": {"max_steps": settings.steps, "epochs": settings.steps}})
    file = Path(settings.out) / f"{name}.yaml"
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        (Path(settings.out) / name / "report.json").unlink(missing_ok=True)  # it is of a run with other keys
    return file


def merged(keys: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Returns nested keys with those of `more` put over them."""
    both = {k: merged(keys[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(keys.get(k), dict)}
    return keys | more | both


def checked(settings: Compare, name: str, file: Path) -> Any:
    """Returns the settings of a run; wrong keys are an error before anything is trained."""
    command = f"finetune {settings.runs[name].get('use', name)}"
    try:
        return parse(command, COMMANDS[command], ["--config", str(file), "--out", str(Path(settings.out) / name)])[0]
    except UserError as error:  # of the file that was written, which the user has not
        of_file, where = f"{file}:", str(error.where)
        key = where.partition(": ")[2] if where.startswith(of_file) else where
        error.where = f"runs.{name}.{key}" if key else f"runs.{name}"
        raise


def train(method: str, config: Path, out: Path) -> int:
    """Trains a run, or what is left of it, in a process of its own; returns its exit code."""
    report = out / "report.json"
    facts = read_json(report, REPORT) if report.exists() else {}
    if facts and not facts["go_on"]:
        tell(f"{out} holds this run already")
        return 0
    words = ["--config", str(config), "--out", str(out), "--resume" if facts else "--overwrite"]
    process = subprocess.Popen([sys.executable, "-m", "litpeft", "finetune", method, *words])
    try:
        return process.wait()
    except KeyboardInterrupt:  # which the run got as well: it saves a checkpoint
        process.wait()
        raise


def write(out: Path, table: list[Row]) -> None:
    """Prints the table, and writes it as compare.md, compare.json and compare.png."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in table]
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out / "compare.json", {row.name: asdict(row) for row in table})
    figure(table).savefig(out / "compare.png")
    say("\n".join(lines))
    say(f"the table, its figures and their picture: {out / 'compare.md'}, compare.json, compare.png")


def figure(table: list[Row]) -> Any:
    """Returns the picture: each run's loss over the parameters that it trained, and its validation loss by step."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    left, right = picture.subplots(1, 2)
    for row in table:
        if row.trainable:
            (point,) = left.plot(row.trainable, row.loss, "o")
            left.annotate(row.name, (row.trainable, row.loss), xytext=(4, 4), textcoords="offset points", fontsize=8)
            if row.validation:
                right.plot(*zip(*row.validation, strict=True), label=row.name, color=point.get_color())
        else:
            edge = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
            left.axhline(row.loss, color="#9ca3af", linewidth=0.8)
            left.annotate(row.name, (1, row.loss), **edge)
    left.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="nats per token on the measured rows")
    right.set(yscale="log", xlabel="optimizer steps", ylabel="validation loss, nats per token")
    right.legend(frameon=False, fontsize=8, ncols=2)
    return picture
