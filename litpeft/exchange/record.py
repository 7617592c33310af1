"""delta.json, the record of a run's result: its fields with types and ranges, and the file's own checksum.

The checksum detects damage, not forgery; so every field is checked.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litpeft.core.errors import ModelError
from litpeft.core.json import read_json
from litpeft.core.kinds import check_least
from litpeft.core.precision import PRECISIONS
from litpeft.core.recognise import ADAPTER_TENSORS
from litpeft.core.typed import LATER, typed
from litpeft.data.builtin import BUILT_IN
from litpeft.data.settings import Thinking
from litpeft.exchange.identity import TokenizerIdentity, checksum, with_defaults
from litpeft.methods import METHODS, method_class
from litpeft.model.config import ModelConfig
from litpeft.model.families import FAMILIES
from litpeft.model.quantize import STORAGES

FORMAT = 4  # in 3 the names of tensors are without that of their Delta (todays_names of model/delta.py)
LARGEST = 1 << 20  # bytes of a delta.json
DELTA = "delta.safetensors"
NOT_OURS = "litpeft has not written it so: take the run's folder again, or train again"


@dataclass
class StorageRecord:
    """How the base's linear layers were quantised."""

    name: Literal[tuple(STORAGES)]
    double_quantize: bool


@dataclass
class BaseOf2:
    """The base in format 2: its weights."""

    path: str
    fingerprint: str
    storage: StorageRecord | None

    def __post_init__(self) -> None:
        check_sha256("fingerprint", self.fingerprint)
        if not os.path.isabs(self.path):
            raise ValueError(f"path must be absolute, got {self.path[:60]!r}")


@dataclass
class BaseRecord(BaseOf2):
    """The base: its weights, and what else determines logits and ids."""

    config: dict[str, Any]
    tokenizer: TokenizerIdentity

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reads(self.config, self.tokenizer)


@dataclass
class InitRecord:
    """What a run began with: another run or an adapter, and the sha256 of its tensors' file."""

    path: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_sha256("fingerprint", self.fingerprint)


@dataclass
class TemplateRecord:
    """The chat template of the training."""

    name: Literal[("model", *BUILT_IN)]
    sha256: str | None  # of the model's own template, null where it has none
    system: str | None
    options: dict[str, Any] | None = field(default=None, metadata=LATER)  # what the template is told
    thinking: Thinking = field(default="error", metadata=LATER)  # of the rows, as in data.thinking
    text_sha256: str | None = field(default=None, metadata=LATER)  # of the exported text, unless it is the model's own

    def __post_init__(self) -> None:
        if self.sha256 is not None or self.name == "model":
            check_sha256("sha256", self.sha256)
        if self.text_sha256 is not None:
            check_sha256("text_sha256", self.text_sha256)


@dataclass
class RecordOf2:
    """delta.json in format 2."""

    format: int
    litpeft: str
    holds: str
    method: str
    settings: dict[str, Any]
    files: dict[str, str]
    base: BaseOf2
    template: TemplateRecord
    precision: Literal[tuple(name for name in PRECISIONS if name != "16-true")]
    step: int  # optimizer steps that the weights have seen
    finished: bool

    def __post_init__(self) -> None:
        method = method_class(self.method)
        typed(method, self.settings, "settings")
        holds = "model" if method.writes_model else "delta"
        if self.holds != holds:
            raise ValueError(f"holds must be {holds} for {self.method}, got {self.holds!r}")
        if holds == "delta" and {*self.files} - {ADAPTER_TENSORS} != {DELTA}:
            what = f"files must name {DELTA} and, at most, {ADAPTER_TENSORS} beside it"
            raise ValueError(f"{what}, got {', '.join(self.files)[:60] or 'none'}")
        for name, sha256 in self.files.items():
            check_sha256(f"files.{name[:60]}", sha256)
        check_least(self, step=1)


@dataclass
class Record(RecordOf2):
    """delta.json as it is written."""

    base: BaseRecord
    steps_done: int  # when the run ended; more than `step` if the weights of an earlier step were better
    steps_planned: int
    init_from: InitRecord | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step <= self.steps_done <= self.steps_planned:
            what = f"step {self.step}, steps_done {self.steps_done} and steps_planned {self.steps_planned}"
            raise ValueError(f"{what} must be in rising order")


def read_record(path: Path) -> dict[str, Any]:
    """Returns the content of a delta.json of this format or an earlier one; an error names the key that is wrong."""
    if path.stat().st_size > LARGEST:
        raise ModelError(f"{path.stat().st_size:,} bytes are too many for the delta.json of a run", where=path)
    facts = read_json(path, "delta.json of a run")
    if facts.pop("checksum", None) != checksum(facts):
        raise ModelError("the file is not as the run wrote it (checksum mismatch)", where=path)
    number, method = facts.get("format"), facts.get("method")
    kind = {2: RecordOf2, 3: Record, FORMAT: Record}.get(number) if type(number) is int else None
    if kind is None or not isinstance(method, str) or method not in METHODS:
        said = ", ".join(f"{key} {str(facts.get(key))[:40]!r}" for key in ("format", "method"))
        raise ModelError(f"{said}: not of this version of litpeft", where=path)
    try:
        typed(kind, facts, "")
    except ValueError as error:
        raise ModelError(str(error), where=path, hint=NOT_OURS) from None
    return facts


def check_reads(config: dict[str, Any], tokenizer: TokenizerIdentity) -> None:
    """Raises a ValueError unless these are values of exchange/identity.py."""
    config = with_defaults(config)
    typed(Literal[tuple(FAMILIES)], config.pop("model_type", None), "config.model_type")
    typed(ModelConfig, config, "config")
    for key in ("file", "vocabulary", "probe"):
        check_sha256(f"tokenizer.{key}", getattr(tokenizer, key))


def check_sha256(key: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{key} must be a sha256 in hexadecimal, got {str(value)[:60]!r}")
