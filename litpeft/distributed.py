"""Tensors that several processes hold in shares (FSDP2's DTensors), and plain ones, through the same few functions."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; all ranks must ask, since those that hold shares send them to each other."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's share of a whole tensor, laid out as `like`, without asking other ranks."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor, or this rank's share of it, into a parameter."""
    if isinstance(parameter, DTensor):
        tensor = share(tensor.to(parameter.device, parameter.dtype), parameter)
    parameter.copy_(tensor)
