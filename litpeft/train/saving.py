"""The checkpoints of a run: what is written of its model, optimiser and progress, and put back when it is resumed."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litpeft.core.distributed import gather
from litpeft.model.delta import copy_into, delta_state, todays_names, training_state
from litpeft.model.gpt import GPT
from litpeft.train.checkpoints import STATE, Checkpoint
from litpeft.train.optimizer_state import load_optimizer, optimizer_tensors
from litpeft.train.preparation import Preparation
from litpeft.train.progress import Progress

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric


def save_checkpoint(
    run: Preparation,
    fabric: "Fabric",
    model: GPT,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    progress: Progress,
    more: dict[str, dict[str, Tensor]],
) -> None:
    """Writes a checkpoint: all ranks give their shares, the first writes.

    `names` are those of the optimiser's parameters, in its order; `more` are further tensors, by their file's stem.
    """
    first, delta = fabric.is_global_zero, {}
    for name, tensor in (delta_state(model) | training_state(model)).items():
        tensor = gather(tensor)
        if first:  # nobody else holds more than its share, and one tensor
            delta[name] = tensor.cpu()
    moments, values = optimizer_tensors(optimizer, names, keep=first)
    if first:
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        state = {"progress": asdict(progress), "optimizer": values, "scaler": scaler and scaler.state_dict()}
        best = {progress.best[0]} if progress.best and run.settings.checkpoint.keep_best else set()
        tensors = {"delta": delta, "optimizer": moments} | more
        run.checkpoints.save(progress.step, tensors, state, run.facts, keep=best)
    fabric.barrier()


def restore(
    fabric: "Fabric", model: GPT, optimizer: torch.optim.Optimizer, names: list[str], saved: Checkpoint
) -> Progress:
    """Puts model and optimiser back to where a checkpoint has them; returns the progress."""
    copy_into(model, saved.tensors("delta"))
    moments = todays_names(model, saved.tensors("optimizer"))
    values = todays_names(model, saved.state["optimizer"])
    load_optimizer(optimizer, names, moments, values, f"{saved.folder / STATE}: optimizer")
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None and saved.state["scaler"]:  # neither where base.precision changed
        scaler.load_state_dict(saved.state["scaler"])
    return Progress.of(saved.state["progress"])
