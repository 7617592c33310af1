"""Tensors that several processes hold in shares (FSDP2's DTensors), and plain ones, through the same few functions."""

import os
import sys

import torch
from torch import Tensor


def is_share(tensor: Tensor) -> bool:
    """Returns whether this is a rank's share of a tensor. A process alone never loads the module, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; all ranks must ask, since those that hold shares send them to each other."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's share of a whole tensor, laid out as `like`, without asking other ranks."""
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_shard(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor, or this rank's share of it, into a parameter."""
    if is_share(parameter):
        tensor = share(tensor.to(parameter.device, parameter.dtype), parameter)
    parameter.copy_(tensor)


def is_first() -> bool:
    """Returns whether this process is the one that speaks and writes; known before the processes are connected."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
    if "LOCAL_RANK" not in os.environ:
        names = ("SLURM_PROCID",)
    return all(os.environ.get(name, "0") == "0" for name in names)
