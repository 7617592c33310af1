"""The loss of rows: the mean of -log p over all trained tokens."""

from typing import Any

import torch
from torch import Tensor

from litpeft.data.batches import Batch, collate, idle, lay_out
from litpeft.data.rows import Row
from litpeft.model.context import Context

MICRO_TOKENS = 2048  # of one forward pass


def summed_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Returns the sum of -log p over the trained tokens of a micro-batch."""
    ctx = Context.packed(batch.lengths, batch.ids.device, batch.prompt_lengths)
    return model(batch.ids, ctx, at=batch.at, targets=batch.targets)


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, rows: list[Row], micro_tokens: int, device: torch.device, fabric: Any = None
) -> float:
    """Returns the loss over all trained tokens of the rows, in nats per token; the ranks of `fabric` share the work."""
    ranks, rank = (1, 0) if fabric is None else (fabric.world_size, fabric.global_rank)
    training = model.training
    model.eval()
    frame = model.frame
    layout = lay_out(range(len(rows)), [sum(frame) + len(row.ids) for row in rows], ranks, micro_tokens, None)[rank]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for numbers in layout:
        batch = collate([rows[i] for i in numbers], *frame) if numbers else idle(rows[0], *frame)
        total += summed_loss(model, batch.to(device)).double()
    if ranks > 1:
        total = fabric.all_reduce(total, reduce_op="sum")
    model.train(training)
    return float(total) / sum(sum(row.trained) for row in rows)
