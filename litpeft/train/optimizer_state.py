"""Saves and restores an optimizer's state, bit for bit, as tensors and plain values by parameter name."""

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
    """Returns the state's tensors as `NAME/KEY`, and its other values by parameter; None: no state yet.

    `names` are those of the parameters, in the order of the optimizer's groups. Every rank must call it; without `keep`
    a rank gets no tensors. The tensors are on the CPU; those that were there already are not copied.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without Fabric's wrapper
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict | None] = {}
    for name, parameter in named_parameters(optimizer, names):
        state = optimizer.state.get(parameter)
        values[name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)} if state else None
        for path, value in by_path(state or {}, name).items():
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
    """Restores the state that `optimizer_tensors` returned in a new optimizer over parameters of the same shapes.

    The optimizer itself creates the state's tensors, so that dtype, device and sharding are as without the
    interruption. If something does not fit, nothing is changed. Every rank must call it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without Fabric's wrapper
    parameters = named_parameters(optimizer, names)
    wrong = [f"{name} is not among what is trained" for name in values if name not in dict(parameters)]
    wrong += [f"{name} is missing" for name, _ in parameters if name not in values]
    expected: dict[str, object] = {}
    states: dict[str, dict] = {}
    groups = (group for group in optimizer.param_groups for _ in group["params"])
    for (name, parameter), group in zip(parameters, groups, strict=True):
        states[name] = {} if values.get(name) is None else fresh_state(optimizer, group, parameter)
        expected |= by_path(states[name], name)
    plain = {path: value for name, saved in values.items() for path, value in by_path(saved or {}, name).items()}
    wrong += [f"{path} is both a tensor and a plain value" for path in plain.keys() & tensors.keys()]
    wrong += misfits(expected, {**plain, **tensors})
    if wrong:
        what = f"the saved state is not of this optimizer over these parameters: {some(wrong, '; ')}"
        hint = "resume with the method, train.optimizer and train.optimizer_args that the run began with"
        raise ModelError(what, where=where, hint=hint)
    for path, value in expected.items():
        name, _, key = path.partition("/")
        if isinstance(value, Tensor):
            copy_shard(value, tensors[path])
        else:
            states[name][key] = plain[path]
    for name, parameter in parameters:
        optimizer.state.pop(parameter, None)
        if values[name] is not None:
            optimizer.state[parameter] = states[name]


def named_parameters(optimizer: torch.optim.Optimizer, names: list[str]) -> list[tuple[str, Tensor]]:
    """Returns the optimizer's parameters with their names."""
    assert len(set(names)) == len(names), "names must be unique"
    assert not any("/" in name for name in names), "a slash separates name and key"
    return list(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))


def by_path(state: dict, name: str) -> dict[str, Any]:
    """Returns the values of a parameter's state as NAME/KEY."""
    return {f"{name}/{key}": value for key, value in state.items()}


def fresh_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict:
    """Returns the state that the optimizer would have for a parameter after a step; changes nothing.

    A copy of the optimizer takes a step on zeros. The state after it has the tensors of a real one, in the same place:
    bitsandbytes may page them, FSDP shards them, and a step counter may be on the CPU.
    """
    zeros = torch.zeros_like(parameter).requires_grad_()
    zeros.grad = torch.zeros_like(parameter)
    copy = object.__new__(type(optimizer))
    copy.__dict__ = optimizer.__dict__ | {"param_groups": [{**group, "params": [zeros]}], "state": defaultdict(dict)}
    if optimizer.state.get(parameter):  # state that its constructor made
        copy.state[zeros] = deepcopy(optimizer.state[parameter])
    type(copy).step(copy)
    return copy.state[zeros]


def misfits(expected: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Returns a line for each entry that is missing in one of them, or that differs in shape or type."""
    lines = [f"{path} is missing" for path in expected if path not in saved]
    lines += [f"{path} does not belong to it" for path in saved if path not in expected]
    both = ((path, describe(saved[path]), describe(expected[path])) for path in expected.keys() & saved.keys())
    return sorted(lines + [f"{path} is {got}, expected {want}" for path, got, want in both if got != want])


def describe(value: object) -> str:
    """Returns the shape and dtype of a tensor, or the type of another value, after JSON."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "a list" if isinstance(value, list | tuple) else f"a plain {type(value).__name__}"
