"""What all methods share: to attach one, list what it trains, save it, switch it off and fold it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from random import Random
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.errors import ConfigError, ModelError, nearest, some
from litpeft.core.typed import LATER
from litpeft.data.batches import Batch
from litpeft.data.tokenizer import Tokenizer
from litpeft.model.added_rows import add_rows
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.slots import OFF, Delta, Linear, Slot, Stated, TiedHead

Held = Callable[[Tensor], Tensor]
D = TypeVar("D", bound=Delta)


@dataclass
class Method:
    """One way to finetune. The fields are its YAML keys and its `--method.*` options."""

    writes_model: ClassVar[bool] = False  # its result is a model folder of its own, not a delta beside the base
    idle_parts: ClassVar[bool] = False  # whether an optimizer step may leave some of what trains without a gradient
    at_answers: ClassVar[tuple[str, ...]] = ()  # keys that may have other values when a run answers
    training_only: ClassVar[tuple[str, ...]] = ("dropout", "lr_ratio")  # keys that a result computes the same without

    token_ids: ClassVar[tuple[int, ...]] = ()  # of `add_tokens`; set by added_tokens.py where the tokenizer is known

    add_tokens: tuple[str, ...] = field(default=(), kw_only=True, metadata=LATER)  # after the method's own keys
    """New tokens: their rows of the embedding and of the head train, e.g. ["<call>", "</call>"]."""
    unfreeze: tuple[str, ...] = field(default=(), kw_only=True)
    """Globs of the base model's own parameters that train too, e.g. `*norm*`."""

    def attach(self, model: GPT) -> None:
        """Fills slots of `model`. Knows shapes only, so that it works on the meta device."""

    def choose(
        self, model: GPT, storage: Storage, read: Callable[[str], Tensor], saved: dict[str, Tensor] | None
    ) -> dict[str, str]:
        """Returns the storages of the linear layers that are not to be held in the run's `storage`, by layer name.

        Called before `attach`, if the base is quantised: `model` has shapes only, `read(name)` is a layer's weight.
        `saved` is as in `start`.
        """
        return {}

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        """Returns the weight (out, in) that a linear layer is to hold, given the base's, which every rank has in full.

        Called for every linear layer as its weight is read. Deltas whose start depends on it are set here, through
        `copy_shard`. `held(weight)` is the weight that the layer would multiply with, rounded to its type or codes.
        `saved` is the delta of an earlier run, which will be loaded afterwards; None if the run begins.
        """
        return weight

    def read(self, tokenizer: Tokenizer) -> None:
        """Encodes settings that are text with the base's tokenizer; called before a training run is built."""

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        """Like `start`, for the embedding (V, d), which stays as it is."""

    @contextmanager
    def training_step(self, model: GPT, draws: Random) -> Iterator[None]:
        """Surrounds an optimizer step. `draws` follow from the step's number, and are the same on every rank."""
        yield

    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        """Measures the base, frozen and not quantised, on rows to train on; called before a new run's model is built.

        `batches` are of one row each, on the model's device. What `attach` and `start` need of it the method keeps.
        """

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Takes from the delta of an earlier run what `attach` needs to know of it; called before it."""

    def penalty(self, model: GPT) -> Tensor | None:
        """Returns what is added to the loss of each step, differentiably; None for nothing."""

    def after_step(self, model: GPT, step: int, steps: int) -> None:
        """Called after optimizer step `step`, from 1, of `steps`, with its gradients; not if the step was skipped."""

    def search(self, model: GPT, loss: Callable[[], float]) -> str | None:
        """Called when `search_step` steps are done; `loss()` measures the model as it is then on the held-out rows.

        Returns a line for the log. Called only if `searches`: then a run needs held-out rows.
        """

    @property
    def searches(self) -> bool:
        """Returns whether `search` is to be called."""
        return False

    def search_step(self, steps: int) -> int:
        """Returns the step of all `steps` after which `search` is called."""
        return steps

    def defines(self, hook: str) -> bool:
        """Returns whether the method has a hook of its own."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def result(self, model: GPT, tensors: dict[str, Tensor]) -> tuple["Method", dict[str, Tensor]]:
        """Returns the method and the delta of a run's result: those of its training without what only training needs.

        `tensors` are whole, and may be changed.
        """
        return self, tensors

    def configure(self, config: dict[str, Any]) -> None:
        """Changes a config.json, in place, so that it describes the merged model."""

    def trained_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the type of trained parameters on a base of `dtype`: float32 or better."""
        return torch.promote_types(dtype, torch.float32)

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the type of the weights that are saved, where the result is a model."""
        return self.trained_dtype(dtype)


def linears(model: GPT, targets: tuple[str, ...]) -> dict[str, Linear]:
    """Returns the linear layers whose names match one of the globs; an error if a glob matches none."""
    key, layers = "method.targets", {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    chosen = {name: layers[name] for glob in targets for name in matching(layers, glob, "linear layer", key)}
    if any(isinstance(m, TiedHead) for m in chosen.values()):
        hint = "leave the head out of the targets"
        what = "the head of this model is its embedding (tie_embeddings); a delta on it alone would untie them"
        raise ConfigError(what, where=key, hint=hint)
    return chosen


def matching(names: Iterable[str], glob: str, kind: str, key: str) -> list[str]:
    """Returns the names that match a glob; an error if there are none."""
    hits = [name for name in names if fnmatchcase(name, glob)]
    if not hits:
        patterns = list(dict.fromkeys(map(pattern, names)))
        words = re.split(r"[^a-z0-9]+", glob.lower())  # those of q_proj, as others call attn.q, are q and proj
        spelt = next((one for one in patterns if one.rpartition(".")[2] in words), None)
        near = nearest(glob, patterns) or (f' (did you mean "{spelt}"?)' if spelt else "")
        what = f'"{glob}" matches no {kind}; the model has {", ".join(patterns)}{near}'
        raise ConfigError(what, where=key)
    return hits


def pattern(name: str) -> str:
    """Returns a glob for a module's name: `*.attn.q` for `blocks.3.attn.q`, `*.experts.*.up` for an expert's layer."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return name if len(parts) < 2 else ".".join(["*", *parts[-3 if parts[-2] == "*" else -2 :]])


def train_base(model: GPT, names: Iterable[str], key: str) -> None:
    """Makes parameters of the base train; an error that names the setting `key` if one of them is held in codes."""
    for name in names:
        parameter = model.get_parameter(name)
        if not parameter.is_floating_point():
            what = f"it names {name}, which base.quantize holds in codes: those cannot train"
            raise ConfigError(what, where=key, hint="set base.quantize null, or name less")
        parameter.requires_grad_(True)


def attach(model: GPT, method: Method) -> None:
    """Fills the slots, freezes the base but for what `unfreeze` names, and records which tensors are the delta.

    `model.base_keys` are the names in the state dict before; `model.delta_keys` those of new and trained tensors, which
    the base's files do not hold; `model.training_keys` those of new tensors that training alone needs.
    """
    base = model.base_keys = set(model.state_dict())
    model.requires_grad_(False)
    method.attach(model)
    if method.token_ids:
        add_rows(model, method.token_ids)
    names = [name for name, _ in model.named_parameters() if name in base]
    for glob in method.unfreeze:
        train_base(model, matching(names, glob, "parameter", "method.unfreeze"), "method.unfreeze")
    if not trainable(model):
        raise ConfigError("this method would train 0 parameters", where="method", hint="give it targets")
    stated = ((place, m) for place, m in model.named_modules() if isinstance(m, Stated))
    model.training_keys = {f"{place}.{key}" for place, module in stated for key in module.for_training}
    keys = {k for k, v in model.state_dict(keep_vars=True).items() if k not in base or v.requires_grad}
    model.delta_keys = keys - model.training_keys


def deltas_of(model: nn.Module, kind: type[D]) -> list[D]:
    """Returns the deltas of a class in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, kind)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lr_factors(model: nn.Module) -> dict[str, float]:
    """Returns by name what the learning rate of trained tensors is multiplied by, where a Delta says so."""
    deltas = {place: module for place, module in model.named_modules() if isinstance(module, Delta)}
    return {f"{place}.{key}": factor for place, delta in deltas.items() for key, factor in delta.lr_factors.items()}


def delta_state(model: GPT) -> dict[str, Tensor]:
    """Returns what a run saves: every tensor that the base's files do not hold."""
    return {name: tensor for name, tensor in model.state_dict().items() if name in model.delta_keys}


def training_state(model: GPT) -> dict[str, Tensor]:
    """Returns what a checkpoint holds beside `delta_state`: what deltas keep from one step to the next."""
    return {name: tensor for name, tensor in model.state_dict().items() if name in model.training_keys}


def todays_names(model: GPT, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns saved values with their keys, a tensor's name or NAME/more, brought to the names of today.

    Until format 3 of delta.json a slot held one Delta, whose own name was not among those of its tensors.
    """
    slots = [(place, slot) for place, slot in model.named_modules() if isinstance(slot, Slot)]
    deltas = [(place, name, delta) for place, slot in slots for name, delta in slot.deltas.items()]
    now = {f"{place}.{key}": f"{place}.{name}.{key}" for place, name, delta in deltas for key in delta.state_dict()}
    parts = ((name.partition("/"), value) for name, value in saved.items())
    return {now.get(name, name) + slash + more: value for (name, slash, more), value in parts}


def misfits(model: GPT, state: dict[str, Tensor]) -> list[str]:
    """Returns what of a saved delta is missing, is of no use, or has another shape in this model."""
    own, state = model.state_dict(keep_vars=True), todays_names(model, state)
    wrong = [f"{name} is missing" for name in sorted(model.delta_keys - set(state))]
    wrong += [f"{name} does not belong to it" for name in sorted(set(state) - model.delta_keys)]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in sorted(model.delta_keys & set(state))}
    return wrong + [f"{name} is {got}, expected {want}" for name, (got, want) in shapes.items() if got != want]


def load_delta(model: GPT, state: dict[str, Tensor], where: str) -> None:
    """Copies a saved delta into the model's own tensors; names and shapes must be exactly the same."""
    if wrong := misfits(model, state):
        raise ModelError(f"the delta does not fit this model: {some(wrong, '; ')}", where=where)
    own, state = model.state_dict(keep_vars=True), todays_names(model, state)
    model.base_values = {name: own[name].detach().clone() for name in state if name in model.base_keys}
    copy_into(model, state)


def copy_into(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies tensors into the model's own of these names; each rank copies its shards."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in todays_names(model, state).items():
        copy_shard(own[name], tensor)


@contextmanager
def without_delta(model: GPT, *names: str) -> Iterator[None]:
    """Switches the finetuned part off, in place, within the `with` block: the model is its base again.

    With names of deltas only those are switched off, and trained base parameters stay.
    """
    slots = [(slot, slot.deltas) for slot in model.modules() if isinstance(slot, Slot) and slot.deltas]
    base_values = {} if names else model.base_values
    trained = {name: model.get_parameter(name).data for name in base_values}
    try:
        left = [
            {n: one for n, d in deltas.items() if (one := d if names and n not in names else d.off()) is not None}
            for _, deltas in slots
        ]
        for (slot, _), on in zip(slots, left, strict=True):
            slot.deltas = on if names or any(left) else OFF  # OFF means that nothing acts in any slot
        for name, tensor in base_values.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for slot, deltas in slots:
            slot.deltas = deltas
        for name, tensor in trained.items():
            model.get_parameter(name).data = tensor
