"""Resuming a run: finds its checkpoint and checks that it is still the same run."""

import hashlib
import json
import platform
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from litpeft import __version__
from litpeft.core.errors import ConfigError, ModelError, nearest, quoted
from litpeft.core.folders import has_result
from litpeft.core.json import jsonable
from litpeft.core.terminal import say
from litpeft.core.typed import LATER, defaults, typed
from litpeft.data.preference import Preference
from litpeft.data.settings import Data
from litpeft.data.store import Rows
from litpeft.exchange.identity import TokenizerIdentity, changed, config_changes, flat, tokenizer_changes
from litpeft.exchange.record import InitRecord, check_reads, check_sha256
from litpeft.exchange.run import find_run
from litpeft.methods import METHODS, method_class
from litpeft.train.checkpoints import MANIFEST, STATE, Checkpoint, Checkpoints
from litpeft.train.progress import Progress
from litpeft.train.settings import Base, Finetune, Train

# Settings that may differ when a run is resumed: they do not change the result, or, as paths, are compared by content.
FREE = (
    *("out", "resume", "resume_changed", "overwrite", "dry_run", "tensorboard", "timeout", "check_rows"),
    *("devices", "num_nodes", "strategy", "cpu_offload", "base.dir", "base.cache", "data.path", "data.validation_path"),
    "data.cache",
    *("checkpoint.*", "ending.*", "validation.sample_tokens", "train.max_time"),
    *("train.activation_checkpointing", "train.compile"),
)


@dataclass
class SavedReads:
    """The identity of the base's config, tokenizer and template."""

    config: dict[str, Any]
    tokenizer: TokenizerIdentity
    template: str

    def __post_init__(self) -> None:
        check_reads(self.config, self.tokenizer)


@dataclass
class SavedFacts:
    """What a checkpoint's manifest says of its run."""

    method: Literal[tuple(METHODS)]
    settings: dict[str, Any]
    base: str
    rows: str
    began: str
    circumstances: dict[str, str | int]
    reads: SavedReads | None = None  # early versions lack this and the next
    counts: dict[str, str] = field(default_factory=dict)
    init_from: InitRecord | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        for key in ("base", "rows"):
            check_sha256(key, getattr(self, key))
        default = Finetune(Base(""), Data("."), "")
        known = jsonable(asdict(default) | {"method": asdict(method_class(self.method)())})
        known["base"]["dir"] = known["train"]["micro_tokens"] = None  # every version has them
        saved = _over(known, self.settings)
        typed(method_class(self.method), saved.pop("method"), "settings.method")
        typed(Finetune, saved, "settings")
        try:
            datetime.fromisoformat(self.began)
        except ValueError as error:
            raise ValueError(f"began is no time: {error}") from None


def _over(known: Any, saved: Any) -> Any:
    """Returns saved settings with defaults for keys that are new since, and without keys that no longer exist."""
    if not (isinstance(known, dict) and isinstance(saved, dict) and known):
        return saved
    return {key: _over(value, saved[key]) if key in saved else value for key, value in known.items()}


@dataclass
class SavedScaler:
    """The loss scale of 16-mixed."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int

    def __post_init__(self) -> None:
        if not (self.scale > 0 and self.growth_factor > 1 > self.backoff_factor > 0 and self.growth_interval > 0):
            raise ValueError(f"no loss scale: {asdict(self)}")


@dataclass
class SavedState:
    """The content of a checkpoint's state.json."""

    progress: Progress
    optimizer: dict[str, dict[str, Any] | None]
    scaler: SavedScaler | None


def check_saved(saved: Checkpoint) -> None:
    """Raises unless a checkpoint's values have the types and ranges that a run writes; checksums do not show that."""
    state = saved.state
    if isinstance(state.get("progress"), dict):  # an older version wrote fewer fields
        state = state | {"progress": asdict(Progress()) | state["progress"]}
    try:
        typed(SavedFacts, {"reads": None, "counts": {}} | saved.facts, "facts")
        progress = typed(SavedState, state, "state").progress
        if progress.step != saved.step:
            raise ValueError(f"state.progress.step is {progress.step} in the checkpoint of step {saved.step}")
        if len(progress.losses) != saved.step:
            raise ValueError(f"state.progress.losses has {len(progress.losses)} of {saved.step} steps")
        if progress.seconds <= 0:
            raise ValueError(f"state.progress.seconds must be above 0, got {progress.seconds}")
        for name, value in vars(progress).items():
            numbers = value or [] if name in ("losses", "best") else [value]
            if any(isinstance(number, int | float) and number < 0 for number in numbers):
                raise ValueError(f"state.progress.{name} must not be below 0")
        measured = [step for step, _ in progress.validations]
        if measured != sorted(set(measured) & set(range(saved.step + 1))):
            raise ValueError(f"state.progress.validations must be of steps up to {saved.step}, in rising order")
        if progress.best and progress.best[0] not in measured:
            raise ValueError(f"state.progress.best is of step {progress.best[0]}, where nothing was measured")
        if any(rows < 0 for windows in progress.windows for rows in windows):
            raise ValueError("state.progress.windows must not be below 0")
        if progress.still > saved.step or progress.waited > len(measured):
            what = f"still {progress.still} and waited {progress.waited}"
            raise ValueError(f"state.progress has {what} after {saved.step} steps and {len(measured)} measurements")
    except ValueError as error:
        hint = "litpeft has not written it so: remove this checkpoint to go on from the one before"
        where = str(saved.folder / (STATE if str(error).startswith("state") else MANIFEST))
        raise ModelError(str(error), where=where, hint=hint) from None


def rows_sha256(*groups: Rows) -> str:
    """Returns the sha256 over the tokens, masks and weights of all rows, in their order."""
    digest = hashlib.sha256()
    for rows in groups:
        sizes = rows.column("tokens").tobytes() + rows.column("weighted").tobytes()
        sizes += rows.column("longest").tobytes() if rows.paired else b""
        digest.update(len(rows).to_bytes(8, "little") + sizes)  # so that no two data sets give the same bytes
        for data in rows.trained_bytes():
            digest.update(data)
    return digest.hexdigest()


def rows_text_sha256(*groups: Rows) -> str:
    """Returns what earlier versions took, which is slower: the sha256 over tokens and masks as text."""
    digest = hashlib.sha256()
    for rows in groups:
        for row in rows:
            digest.update(row.content)
        digest.update(b"next")
    return digest.hexdigest()


def circumstances(device: torch.device, ranks: int) -> dict[str, Any]:
    """Returns what a run's last bits depend on beside its settings."""
    versions = {"litpeft": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": device.type, "threads": torch.get_num_threads(), "ranks": ranks}


def find_saved(out: Path, checkpoints: Checkpoints) -> Checkpoint | None:
    """Returns the newest complete checkpoint of the run in `out`, or None if there is no run yet."""
    saved = checkpoints.newest()
    if saved is not None:
        check_saved(saved)
        return saved
    hint = "name another out, or begin again with --overwrite"
    if checkpoints.steps():
        raise ModelError("none of the run's checkpoints is whole", where=str(out), hint=hint)
    if has_result(out):  # a new run would replace it
        raise ModelError("it holds a result but no checkpoint to continue from", where=str(out), hint=hint)
    say(f"{out} holds no checkpoint: the run begins")
    return None


def finished_at(out: Path) -> int | None:
    """Returns the step of a finished run's result; None if its report, which is written last, is missing."""
    done = find_run(out) if (out / "final").exists() and (out / "report.md").exists() else None
    return done.facts["step"] if done and done.facts["finished"] else None


def differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields a text for each of method, base and rows that is not what it was when the run began."""
    if then["method"] != now["method"]:
        yield f"another method: {then['method']} then, {now['method']} now"
    if then["base"] != now["base"]:
        old, new = (facts["settings"]["base"]["dir"] for facts in (then, now))
        moved = f"those of {old} then, of {new} now" if old != new else f"the files in {new} have changed since"
        yield f"other base weights: {moved}"
    if reads := then.get("reads"):  # early versions lack them, and counts
        if lines := config_changes(reads["config"], now["reads"]["config"]):
            yield f"another config of the base (config.json): {'; '.join(lines)}"
        if lines := tokenizer_changes(reads["tokenizer"], now["reads"]["tokenizer"]):
            yield f"another tokenizer: {'; '.join(lines)}"
        if reads["template"] != now["reads"]["template"]:
            yield "another chat template"
    if then["rows"] != now["rows"]:
        lines = [line for line in changed(then["settings"], now["settings"]) if line.startswith("data.")]
        pairs = [(part, was, now["counts"].get(part)) for part, was in then.get("counts", {}).items()]
        lines += [f"{part}: {was} -> {there}" for part, was, there in pairs if was != there]
        yield f"other rows: {'; '.join(lines) or 'as many rows and tokens, but other text, weights or order'}"


def check_same_run(saved: Checkpoint, facts: dict[str, Any], allowed: tuple[str, ...]) -> list[str]:
    """Returns the settings that changed and were allowed to; raises if anything else of the run has changed."""
    where = str(saved.folder)
    difference = next(differences(saved.facts, facts), None)
    if difference is not None:
        hint = "a resumed run continues on what it began with; take another out for a new run"
        raise ConfigError(f"the run began with {difference}", where=where, hint=hint)
    then = defaults(Finetune) | saved.facts["settings"]
    then = then | {
        "method": defaults(method_class(facts["method"])) | then["method"],
        "data": defaults(Data) | then["data"],
        "train": defaults(Train) | then["train"],
        "preference": asdict(Preference()) | then.get("preference", {}),
    }
    lines = changed(then, facts["settings"], FREE)
    keys = list(flat(then) | flat(facts["settings"]))
    if unknown := [glob for glob in allowed if not any(fnmatchcase(key, glob) for key in keys)]:
        what = f"there is no setting {quoted(unknown[0])}{nearest(unknown[0], keys)}"
        raise ConfigError(what, where="resume_changed", hint="the run's run.yaml lists them, as groups: train.lr")
    refused = [line for line in lines if not any(fnmatchcase(line.split(":")[0], glob) for glob in allowed)]
    if refused:
        what = f"the run began with other settings: {'; '.join(refused)}"
        keys = shlex.quote(json.dumps([line.split(":")[0] for line in refused]))
        raise ConfigError(what, where=where, hint=f"take them back, or say that they may: --resume_changed {keys}")
    then, now = saved.facts["circumstances"], facts["circumstances"]
    other = [f"{key} {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value]
    if other:
        say(f"the last bits may differ from those of an uninterrupted run: {'; '.join(other)}")
    for line in lines:
        say(f"changed since the run began: {line}")
    return lines
