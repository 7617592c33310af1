"""`train.micro_tokens` auto: the tokens of a forward pass, on a GPU as many as fit into its memory.

How a step's rows are spread over passes changes only the last bits of its sums.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.model.delta import trainable
from litpeft.model.objective import summed_loss

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

ON_A_CPU = 2048  # tokens; more make nothing faster there
MOST = 8192  # tokens that keep a GPU busy with any model
STEP = 256  # the result is a multiple of it
PROBES = (512, 1024)  # tokens of the passes whose memory is measured
DOCUMENT = 512  # tokens of a document in them
SHARE = 0.9  # of the free memory; the rest is for differences between passes
MOMENTS = 8  # bytes of optimizer state for each trained number


def fitting_tokens(model: torch.nn.Module, fabric: "Fabric", recorded: float = 0) -> int:
    """Returns the tokens of a forward pass of `model`, as Fabric wraps it, that fit on every rank.

    On a GPU it runs three small forward and backward passes, and leaves no gradient behind. Passes of up to `recorded`
    tokens are recorded: see `most_tokens`.
    """
    if fabric.device.type != "cuda":
        return ON_A_CPU
    peaks = [_peak(model, fabric, tokens) for tokens in (PROBES[0], *PROBES)][1:]  # the first makes workspaces
    free, _ = torch.cuda.mem_get_info(fabric.device)
    free += torch.cuda.memory_reserved(fabric.device) - torch.cuda.memory_allocated(fabric.device)
    free -= MOMENTS * sum(parameter.numel() for parameter in trainable(model).values())
    most = torch.tensor(float(most_tokens(peaks, SHARE * free, recorded)), device=fabric.device)
    if fabric.world_size > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MIN)
    return int(most)


def most_tokens(peaks: list[float], free: float, recorded: float = 0) -> int:
    """Returns how many tokens fit into `free` bytes, if passes of PROBES tokens have `peaks` of bytes.

    Passes of up to `recorded` tokens hold memory of their own beside that of the others, as much as the longest needs.
    """
    each = max((peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0]), 1.0)
    if recorded and 2 * (peaks[0] + (recorded - PROBES[0]) * each) >= free:
        free /= 2
    elif recorded:
        free -= peaks[0] + (recorded - PROBES[0]) * each
    fitting = PROBES[0] + (free - peaks[0]) / each
    return int(min(MOST, max(STEP, fitting // STEP * STEP)))


def _peak(model: torch.nn.Module, fabric: "Fabric", tokens: int) -> float:
    """Returns the peak of additional memory, in bytes, of a pass of so many tokens."""
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
