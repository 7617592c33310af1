"""How many tokens a forward pass takes where `train.micro_tokens` is auto: on a GPU as many as its memory holds.

How the rows of a step are spread over passes changes nothing that is learned, but the last bits of its sums.
"""

import torch
from lightning.fabric import Fabric
from torch import Tensor

from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.model.delta import trainable
from litpeft.model.objective import summed_loss

ON_A_CPU = 2048  # tokens; more make nothing faster there
MOST = 8192  # tokens from which a GPU is busy with any model
STEP = 256  # tokens of which the answer is a multiple
PROBES = (512, 1024)  # tokens of the passes whose memory is measured
DOCUMENT = 512  # tokens of a document in them
SHARE = 0.9  # of the memory that is free, for what differs from pass to pass
MOMENTS = 8  # bytes that the optimiser will hold for each number that trains


def fitting_tokens(model: torch.nn.Module, fabric: Fabric, moments: int = MOMENTS) -> int:
    """Returns the tokens of a forward pass of `model`, as Fabric wraps it, for this device or the fullest of the ranks.

    On a GPU it computes two small passes, forward and backward, and leaves no gradient behind.
    """
    if fabric.device.type != "cuda":
        return ON_A_CPU
    peaks = [_peak(model, fabric, tokens) for tokens in PROBES]
    free, _ = torch.cuda.mem_get_info(fabric.device)
    free += torch.cuda.memory_reserved(fabric.device) - torch.cuda.memory_allocated(fabric.device)
    free -= moments * sum(parameter.numel() for parameter in trainable(model).values())
    most = torch.tensor(float(most_tokens(peaks, SHARE * free)), device=fabric.device)
    if fabric.world_size > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MIN)
    return int(most)


def most_tokens(peaks: list[float], free: float) -> int:
    """Returns how many tokens fit into `free` bytes, if passes of PROBES tokens took `peaks` bytes at most."""
    each = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    fitting = PROBES[0] + (free - peaks[0]) / max(each, 1.0)
    return int(min(MOST, max(STEP, fitting // STEP * STEP)))


def _peak(model: torch.nn.Module, fabric: Fabric, tokens: int) -> float:
    """Returns the bytes that a pass of so many tokens takes beside what is held before and after it."""
    row = Row([1] * DOCUMENT, [False] + [True] * (DOCUMENT - 1), 1, "a probe", [])
    batch = collate([row] * (tokens // DOCUMENT)).to(fabric.device)
    torch.cuda.synchronize(fabric.device)
    torch.cuda.reset_peak_memory_stats(fabric.device)
    before = torch.cuda.memory_allocated(fabric.device)
    loss: Tensor = summed_loss(model, batch)
    fabric.backward(loss)
    torch.cuda.synchronize(fabric.device)
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(fabric.device) - before
