"""The optimizer by name, and the learning rate as a function of the step."""

import inspect
import math
from collections.abc import Mapping
from types import ModuleType

import torch
import torch.nn as nn

from litpeft.core.distributed import is_sharded
from litpeft.core.errors import ConfigError, nearest
from litpeft.model.delta import trainable
from litpeft.model.quantize.codes import bitsandbytes
from litpeft.train.launch import peer_lost
from litpeft.train.optimizer_state import fresh_state
from litpeft.train.settings import Train


def total_steps(rows: int, train: Train) -> int:
    """Returns the optimizer steps of a run; the last step of an epoch takes the rows that are left."""
    steps = train.epochs * -(-rows // train.batch_size)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def lr_at(step: int, steps: int, train: Train) -> float:
    """Returns the learning rate of optimizer step `step` (from 0) of `steps`.

    It rises from lr / warmup in the first step to lr, then falls, and would be min_lr one step after the last.
    """
    warmup = min(train.warmup_steps, steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return train.min_lr + left * (train.lr - train.min_lr)


def make_optimizer(
    train: Train,
    parameters: Mapping[str, nn.Parameter],
    device: torch.device | str = "cpu",
    scaled: bool = False,
    lr_factors: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Returns the optimizer of `train.optimizer` over these parameters by name, which are on `device`.

    `lr_factors` are what the learning rate of some of them is multiplied by; a group keeps its own. `scaled`:
    gradients will be scaled, as in 16-mixed; Fabric cannot clip those of a fused optimizer. Vectors (norms and biases)
    have no weight decay, which would pull them to zero and not to the base model.
    """
    library, _, name = train.optimizer.rpartition(".")
    if library not in ("", "bitsandbytes"):
        what = f"{train.optimizer!r} is neither a class of torch.optim nor bitsandbytes.NAME"
        raise ConfigError(what, where="train.optimizer")
    module = _bitsandbytes() if library else torch.optim
    known = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    for unfit in ("Optimizer", "LBFGS", "SparseAdam"):  # a base class; wants a closure; wants sparse gradients
        known.pop(unfit, None)
    if name not in known:
        raise ConfigError(f"{module.__name__} has no {name!r}{nearest(name, sorted(known))}", where="train.optimizer")
    if train.optimizer.startswith("bitsandbytes.Paged") and torch.device(device).type != "cuda":
        what = f"{name} pages its state between a GPU and the machine's memory, and this run is on {device}"
        raise ConfigError(what, where="train.optimizer", hint=f"take bitsandbytes.{name.removeprefix('Paged')}")
    takes = inspect.signature(known[name]).parameters
    arguments = dict(train.optimizer_args)
    both = sorted({"lr", "weight_decay"} & set(arguments))
    if both:
        hint = f"set train.{both[0]}"
        raise ConfigError(f"{both[0]} has a key of its own", where="train.optimizer_args", hint=hint)
    unknown = sorted(set(arguments) - set(takes))
    if unknown:
        what = f"{name} takes no {unknown[0]!r}{nearest(unknown[0], list(takes))}"
        raise ConfigError(what, where="train.optimizer_args")
    if "weight_decay" in takes:
        arguments["weight_decay"] = train.weight_decay
    elif train.weight_decay:
        raise ConfigError(f"{name} has no weight decay", where="train.weight_decay")
    if name in ("Adam", "AdamW") and not library and not scaled and not {"fused", "foreach"} & set(arguments):
        arguments["fused"] = True  # one pass over each tensor
    if scaled and arguments.get("fused"):
        what = "base.precision 16-mixed scales its gradients, which a fused optimiser cannot clip"
        raise ConfigError(what, where="train.optimizer_args", hint="leave fused out")
    factors = lr_factors or {}
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        kinds.setdefault((parameter.ndim < 2, factors.get(key, 1.0)), []).append(parameter)
    groups = [
        {"params": chosen, "lr_factor": factor, "lr": factor * train.lr}
        | ({"weight_decay": 0.0} if vectors and "weight_decay" in takes else {})
        for (vectors, factor), chosen in sorted(kinds.items(), key=lambda kind: kind[0])
    ]
    try:
        optimizer = known[name](groups, lr=train.lr, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} refuses: {error}", where="train.optimizer_args") from None
    _check_step(optimizer)
    return optimizer


def check_optimizer(train: Train, model: nn.Module, dtype: torch.dtype, device: torch.device, scaled: bool) -> None:
    """Raises unless `make_optimizer` accepts the trained parameters of `model`, which may be on the meta device.

    It is tried on the smallest parameter of each number of dimensions; only these are allocated. The usual one is not:
    it takes whatever trains, and to make it imports torch's compiler, for which no error of a setting should wait.
    """
    if train.optimizer == Train.optimizer and not train.optimizer_args:
        return
    falling = sorted(trainable(model).values(), key=lambda p: p.numel(), reverse=True)
    smallest = {p.ndim: p for p in falling}  # of each number of dimensions the last
    tried = {str(n): nn.Parameter(torch.zeros(p.shape, dtype=dtype, device=device)) for n, p in smallest.items()}
    make_optimizer(train, tried, device, scaled)


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises unless the optimizer can step on the smallest parameter of each group, with gradients of zeros.

    A row-wise or a foreign kernel, for example, cannot step on FSDP's shards, and few optimizers check that.
    """
    for group in optimizer.param_groups:
        smallest = min(group["params"], key=lambda parameter: parameter.numel())
        try:
            fresh_state(optimizer, group, smallest)
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            if peer_lost(error):
                raise
            shared = is_sharded(smallest)
            name, why = type(optimizer).__name__, " ".join(str(error).split())[:160]
            what = f"{name} cannot step on {'the shares of strategy fsdp' if shared else 'what this trains'}: {why}"
            hint = "take AdamW, or another of torch.optim" + (", or strategy ddp" if shared else "")
            raise ConfigError(what, where="train.optimizer", hint=hint) from None


def _bitsandbytes() -> ModuleType:
    try:
        return bitsandbytes().optim
    except ImportError as error:
        raise ConfigError(f"bitsandbytes cannot be used: {error}", where="train.optimizer") from None
