"""An optimiser's state as tensors and plain values, by the names of the parameters; and back, bit for bit."""

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from litpeft.core.distributed import copy_shard, gather
from litpeft.core.errors import ModelError, some


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, dict | None]]:
    """Returns the tensors of the state as `NAME/KEY`, and the rest of it by parameter; None: it has no state yet.

    `names` are those of the parameters in the order of the optimiser's groups. Every rank must ask, and those that
    do not `keep` get no tensors. The tensors are on the CPU, and those that were there are the optimiser's own.
    """
    optimizer = unwrapped(optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict | None] = {}
    for name, parameter in named_parameters(optimizer, names):
        state = optimizer.state.get(parameter)
        values[name] = without_tensors(state) if state else None
        for path, value in leaves(state or {}, name).items():
            if isinstance(value, Tensor):
                value = gather(value).detach()
                if keep:
                    tensors[path] = value.cpu()
    return tensors, values


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: list[str],
    tensors: dict[str, Tensor],
    values: dict[str, dict | None],
    where: str = "optimizer",
) -> None:
    """Gives a fresh optimiser the state that `optimizer_tensors` returned of one over parameters of the same shapes.

    The optimiser itself makes the places for it, so that each tensor has the type, device and share that it would have
    had without the interruption. Nothing is changed if something does not fit. Every rank must ask.
    """
    optimizer = unwrapped(optimizer)
    parameters = named_parameters(optimizer, names)
    wrong = [f"{name} is not among what is trained" for name in values if name not in dict(parameters)]
    expected: dict[str, object] = {}
    states: dict[str, dict] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = parameters[len(states)][0]
            if name not in values:
                wrong.append(f"{name} is missing")
            saved = values.get(name)
            states[name] = {} if saved is None else fresh_state(optimizer, group, parameter)
            expected |= leaves(states[name], name)
    plain = {path: value for name, saved in values.items() for path, value in leaves(saved or {}, name).items()}
    wrong += [f"{path} is both a tensor and a plain value" for path in plain.keys() & tensors.keys()]
    wrong += misfits(expected, {**plain, **tensors})
    if wrong:
        what = f"the saved state is not of this optimizer over these parameters: {some(wrong, '; ')}"
        hint = "resume with the method, train.optimizer and train.optimizer_args that the run began with"
        raise ModelError(what, where=where, hint=hint)
    for name, parameter in parameters:
        if values[name] is not None:
            optimizer.state[parameter] = filled(states[name], name, tensors, plain)
        else:
            optimizer.state.pop(parameter, None)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the optimiser in Fabric's wrapper, or the optimiser."""
    return getattr(optimizer, "optimizer", optimizer)


def named_parameters(optimizer: torch.optim.Optimizer, names: list[str]) -> list[tuple[str, Tensor]]:
    """Returns the optimiser's parameters with their names."""
    assert len(set(names)) == len(names), "names tell parameters apart"
    assert not any("/" in name for name in names), "a slash ends the name"
    return list(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))


def leaves(state: dict, path: str) -> dict[str, Any]:
    """Returns what nested dicts hold, as PATH/KEY/KEY."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        found |= leaves(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}": value}
    return found


def without_tensors(state: dict) -> dict:
    """Returns nested dicts with their tensors left out."""
    kept = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return {key: without_tensors(value) if isinstance(value, dict) else value for key, value in kept.items()}


def filled(state: dict, path: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict:
    """Returns the nested dicts of `state` with what was saved in place of what they hold."""
    for key, value in state.items():
        at = f"{path}/{key}"
        if isinstance(value, dict):
            filled(value, at, tensors, plain)
        elif isinstance(value, Tensor):
            copy_shard(value, tensors[at])
        else:
            state[key] = plain[at]
    return state


def fresh_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict:
    """Returns the state that the optimiser would have for a parameter after a step; nothing else changes.

    A copy of the optimiser steps on zeros. Only so is it known what an optimiser keeps, and where: the paged memory of
    bitsandbytes, the shares of FSDP, or a step counter on the CPU.
    """
    zeros = torch.zeros_like(parameter).requires_grad_()
    zeros.grad = torch.zeros_like(parameter)
    copy = object.__new__(type(optimizer))
    copy.__dict__ = optimizer.__dict__ | {"param_groups": [{**group, "params": [zeros]}], "state": defaultdict(dict)}
    if optimizer.state.get(parameter):  # made with the optimiser, before any step
        copy.state[zeros] = deepcopy(optimizer.state[parameter])
    type(copy).step(copy)
    return copy.state[zeros]


def misfits(expected: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Returns a line for each place of the state that is not in both, or that is not of one shape and type."""
    lines = [f"{path} is missing" for path in expected if path not in saved]
    lines += [f"{path} does not belong to it" for path in saved if path not in expected]
    for path in expected.keys() & saved.keys():
        want, got = describe(expected[path]), describe(saved[path])
        if want != got:
            lines.append(f"{path} is {got}, expected {want}")
    return sorted(lines)


def describe(value: object) -> str:
    """Returns the shape and type of a tensor, or what kind of value it is, as JSON gives it back."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "a list" if isinstance(value, list | tuple) else f"a plain {type(value).__name__}"
