"""Counts the bytes that a forward pass leaves behind for its backward pass, whichever hooks autograd has."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litpeft.data.batches import Batch
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.memory[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results


def held(model: GPT, batch: Batch) -> int:
    """Returns the bytes that live on after the forward pass, without those of the model."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    with Made() as made:
        loss = summed_loss(model, batch)
    count = sum(size for key, (ref, size) in made.memory.items() if key not in own and not ref.expired())
    del loss
    return count
