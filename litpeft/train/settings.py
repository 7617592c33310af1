"""Settings of `litpeft finetune`: what every method shares. A method's own keys are in litpeft/methods."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from litpeft.core.errors import quoted
from litpeft.core.kinds import Checkpointing, check_choices, check_least
from litpeft.core.typed import LATER, later
from litpeft.data.preference import Preference
from litpeft.data.settings import Data
from litpeft.model.quantize import DOUBLE, STORAGES


@dataclass
class Base:
    """The model to start from."""

    dir: str
    """Hugging Face folder of the base model."""
    precision: Literal["auto", "bf16-true", "bf16-mixed", "16-mixed", "32-true", "64-true"] = "auto"
    """Type of weights and arithmetic; auto: bf16-true where the device has it, else 32-true. 16-mixed scales the
    loss, since small gradients vanish in float16."""
    quantize: Literal[tuple(STORAGES)] | None = None
    """Hold the linear layers of the blocks in 2, 3, 4 or 8 bits a weight; null: as base.precision says."""
    double_quantize: bool = True
    """With nf4, nf3, nf2 and fp4: quantise the constants too, 0.127 bits a weight for them instead of 0.5."""
    cache: bool = False
    """Keep the quantised weights in a folder of base.dir, and read them from there the next time."""

    def __post_init__(self) -> None:
        check_choices(self, "base.")
        if self.cache and self.quantize is None:
            raise ValueError("base.cache is used only with base.quantize, which is null")
        if not self.double_quantize and self.quantize not in DOUBLE:
            known = " or ".join(DOUBLE)
            raise ValueError(f"base.double_quantize is used only with base.quantize {known}, got {self.quantize}")


@dataclass
class Train:
    """The training loop."""

    batch_size: int = 8
    """Rows of an optimizer step."""
    micro_tokens: int | Literal["auto"] = "auto"
    """With data.packing: tokens of one forward pass, which holds as many of the step's rows as fit; auto: 2,048 on a
    CPU, on a GPU what fits into its memory, at most 8,192."""
    micro_batch_size: int = 1
    """Without data.packing: rows of one forward pass."""
    epochs: int = 1
    """Passes over the rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if the epochs are not over before."""
    max_time: float | None = None
    """Stop after this many minutes."""
    lr: float = 2e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises to lr, at most a quarter of the run; 0 starts at lr."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min_lr after the warmup: cosine, linear, or constant (stays at lr)."""
    optimizer: str = "AdamW"
    """A class of torch.optim, or of bitsandbytes.optim as `bitsandbytes.NAME`."""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. {"betas": [0.9, 0.95]}."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of all that trains but vectors: norms and biases keep their size."""
    max_norm: float | None = 1.0
    """Largest norm of the gradient; a larger one is scaled down. null = no limit."""
    neftune: float = later(0.0)
    """Noise on the embedded tokens in training, against learning rows by heart (NEFTune's alpha; its paper takes 5);
    0: none."""
    activation_checkpointing: Checkpointing | bool = "none"
    """What blocks keep for the backward pass, which computes the rest again. none: everything; cheap: all but norms,
    activations, dropout and casts; block: each block's input only; offload: that in host memory, on a GPU. Older files
    say true (block) and false (none)."""
    compile: bool = False
    """Have torch compile the blocks, which takes up to a minute at the start. Meant for GPUs: on a CPU with AVX-512
    BF16 litpeft's own code is faster."""
    seed: int = 0
    """Seeds the new parameters and the dropout."""

    def __post_init__(self) -> None:
        check_least(self, "train.", batch_size=1, micro_tokens=1, micro_batch_size=1, epochs=1, max_steps=1)
        check_least(self, "train.", warmup_steps=0, weight_decay=0, min_lr=0, neftune=0)
        if isinstance(self.activation_checkpointing, bool):
            self.activation_checkpointing = "block" if self.activation_checkpointing else "none"
        if self.activation_checkpointing not in get_args(Checkpointing):
            known = ", ".join(get_args(Checkpointing))
            got = quoted(self.activation_checkpointing)
            raise ValueError(f"train.activation_checkpointing must be one of {known}, got {got}")
        for name in ("lr", "min_lr", "max_time", "max_norm", "weight_decay", "neftune"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"train.{name} must be a finite number, got {value}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"train.seed must be at least 0 and below 2**62, got {self.seed}")
        for name in ("lr", "max_time", "max_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train.{name} must be above 0, got {value}")
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr must be at most train.lr ({self.lr}), got {self.min_lr}")
        for name, value in self.optimizer_args.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"train.optimizer_args.{name} must be finite, got {value}")
        check_choices(self, "train.")


@dataclass
class Validation:
    """What is measured on the held-out rows."""

    interval: int | None = None
    """Optimizer steps between two measurements; default: ten in the run, or as many as take a tenth of its time. The
    start and the end are measured too."""
    max_rows: int | None = None
    """Measure on the first so many held-out rows only; default: all, or in a short run as many as fit."""
    sample_tokens: int = 64
    """Longest sample answer that is shown at measurements, in tokens; 0 shows none."""
    metric: Literal["loss", "exact", "preferred"] = "loss"
    """What the best checkpoint and patience go by: loss; exact, the share of rows whose answer is the row's own; or
    preferred, with preference.loss the share of pairs whose chosen answer is preferred."""
    patience: int | None = None
    """Stop after so many measurements in a row that are no better than the best; null = never."""
    final: Literal["last", "best"] = "last"
    """The weights that the run ends with: last, or best by the metric."""

    def __post_init__(self) -> None:
        check_least(self, "validation.", interval=1, max_rows=1, sample_tokens=0, patience=1)
        check_choices(self, "validation.")


@dataclass
class Checkpoint:
    """What is kept on disk while a run goes on, so that `--resume` can continue it."""

    interval: int | None = None
    """Optimizer steps between two checkpoints; default: ten in the run. 0: only when the run is stopped."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the one that measured best on the held-out rows too."""

    def __post_init__(self) -> None:
        check_least(self, "checkpoint.", interval=0, keep_last=1)


@dataclass
class Ending:
    """What is measured once the run is over, without and with what it has learned."""

    rows: int | Literal["auto"] = "auto"
    """Rows to train on, chosen by data.seed, whose losses go to rows.csv; auto: as many as take some 3 % of the
    training's time, from 1 to 1,000. 0, or with preference.loss: none."""
    neutral: str = "auto"
    """Text that shows what was forgotten: a .txt file, auto (a page of plain English), or none."""

    def __post_init__(self) -> None:
        check_least(self, "ending.", rows=0)


@dataclass
class Finetune:
    """Teach a model something of your own."""

    base: Base
    data: Data
    out: str
    """Folder of the run; must not hold another."""
    train: Train = field(default_factory=Train)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    ending: Ending = field(default_factory=Ending)
    preference: Preference = field(default_factory=Preference)
    check_rows: bool = True
    """Say before the first step what is suspicious about the rows, in a few lines; `litpeft data check` says more."""
    devices: int = 1
    """GPUs of each machine, or processes where there is no GPU."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Over several devices: ddp (each holds the model), fsdp (they share it between them); auto: ddp."""
    cpu_offload: bool = False
    """With fsdp: keep each device's share in the machine's memory while it is not used."""
    init_from: str | None = field(default=None, metadata=LATER)
    """Begin with what this run, or this adapter of peft, has learned, instead of the method's own start; step 0 and a
    fresh optimizer. Settings of the method that are not given are taken from it."""
    timeout: float = 1800.0
    """Seconds that a device waits for another before it gives the run up."""
    resume: bool = False
    """Continue the run that `out` holds from its newest checkpoint; where it holds none, begin."""
    resume_changed: tuple[str, ...] = ()
    """Globs of settings that may differ from those that the run began with, e.g. train.epochs."""
    tensorboard: bool = False
    """Write TensorBoard files too; metrics.csv is always written."""
    dry_run: bool = False
    """Check all that the run would check, read the data, count, show one row with its trained tokens marked, and stop.
    Trains nothing, writes nothing, reads no weights but their headers."""
    overwrite: bool = False
    """Replace the run that `out` holds."""

    @property
    def compared(self) -> list[Path]:
        """Returns the folders whose weights' sums the command compares."""
        return [Path(self.base.dir)]

    def __post_init__(self) -> None:
        train, default = self.train, Train()
        check_least(self, devices=1, num_nodes=1)
        check_choices(self)
        if self.cpu_offload and self.strategy != "fsdp":
            raise ValueError(f"cpu_offload is used only with strategy fsdp, got {self.strategy}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be above 0 and finite, got {self.timeout}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: one continues the run, the other removes it")
        if self.resume_changed and not self.resume:
            raise ValueError("resume_changed is used only with resume true: it says what may differ from that run")
        if self.validation.final == "best" and not self.checkpoint.keep_best:
            raise ValueError("validation.final best needs checkpoint.keep_best true")
        if self.data.packing and train.micro_batch_size != default.micro_batch_size:
            raise ValueError("train.micro_batch_size is used only with data.packing false; see train.micro_tokens")
        if not self.data.packing and train.micro_tokens != default.micro_tokens:
            raise ValueError("train.micro_tokens is used only with data.packing true; see train.micro_batch_size")
        self._check_preference()
        if self.data.streaming and (train.max_steps is None or train.epochs != default.epochs):
            raise ValueError("data.streaming true needs train.max_steps, and does not use train.epochs")
        if train.schedule == "constant" and train.min_lr:
            raise ValueError("train.min_lr is not used by train.schedule constant, which stays at train.lr")

    def _check_preference(self) -> None:
        """Raises for settings that do not go with pairs of answers, or that need them."""
        data, loss = self.data, self.preference.loss
        if loss is None:
            if self.validation.metric == "preferred":
                raise ValueError("validation.metric preferred is used only with preference.loss")
            return
        refused = {
            "data.streaming true": data.streaming,
            "data.mask_prompt false": not data.mask_prompt,
            "data.overlong split": data.overlong == "split",
            "data.columns": data.columns is not None,
            f"data.format {data.format}": data.format not in ("auto", "preference"),
            f"ending.rows {self.ending.rows}": self.ending.rows not in ("auto", 0),
        }
        for key, given in refused.items():
            if given:
                raise ValueError(f"preference.loss {loss} learns from pairs of answers, and does not take {key}")
