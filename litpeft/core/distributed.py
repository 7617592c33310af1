"""The same few functions for tensors that are sharded over processes (FSDP2's DTensors) and for ordinary ones."""

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether this is a DTensor; does not import the module of DTensor, which is slow, if nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensor: Tensor) -> Tensor:
    """Returns the full tensor; all ranks must call it, since they exchange their shards."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def copy_shard(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a full tensor, or this rank's shard of it, into a parameter, without communication."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        full = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)
