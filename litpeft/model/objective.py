"""The loss of rows: the mean of -log p over all trained tokens, or their weighted mean.

loss = sum(w_t * -log p_t) / sum(w_t)        w_t = the weight of its row times that of its message, 1 by default

Of pairs of answers it is the weighted mean of their losses: see preference.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.data.batches import Batch, collate, collate_pairs, idle, idle_pairs, lay_out
from litpeft.data.preference import Preference
from litpeft.data.rows import Row, totals
from litpeft.model.context import Context
from litpeft.model.preference import losses_of

MICRO_TOKENS = 2048  # of one forward pass
APART = 512  # tokens of several rows whose losses are told apart: all their logits exist at one time


def summed_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Returns the sum of -log p over the trained tokens of a micro-batch, each times its weight if it has one."""
    ctx = Context.packed(batch.lengths, batch.ids.device, batch.prompt_lengths)
    weights = {} if batch.weights is None else {"weights": lambda: batch.weights}
    return model(batch.ids, ctx, at=batch.at, targets=batch.targets, **weights)


def summed_pair_loss(model: torch.nn.Module, batch: Batch, preference: Preference) -> Tensor:
    """Returns the sum of the losses of a micro-batch's pairs, each times its weight."""
    pairs = batch.pairs

    def summed(losses: Tensor) -> Tensor:
        found = losses_of(preference, pairs.sums(losses), pairs.counts, pairs.references)
        return (found * pairs.weights).sum().to(losses.dtype)

    ctx = Context.packed(batch.lengths, batch.ids.device, batch.prompt_lengths)
    return model(batch.ids, ctx, at=batch.at, targets=batch.targets, objective=summed)


@torch.no_grad()
def answer_sums(
    model: torch.nn.Module, rows: Sequence[Row], micro_tokens: int, device: torch.device, fabric: Any = None
) -> Tensor:
    """Returns log p (P, 2), summed over its trained tokens, of the chosen and the rejected answer of each pair.

    It is float64 on the CPU; the ranks of `fabric` share the work.
    """
    ranks, rank = (1, 0) if fabric is None else (fabric.world_size, fabric.global_rank)
    training, frame = model.training, model.frame
    model.eval()
    lengths = [2 * sum(frame) + row.tokens for row in rows]
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    for numbers in lay_out(range(len(rows)), lengths, ranks, micro_tokens, None)[rank]:
        batch = collate_pairs([rows[i] for i in numbers], *frame) if numbers else idle_pairs(rows[0], *frame)
        batch = batch.to(device)
        ctx = Context.packed(batch.lengths, device, batch.prompt_lengths)
        sums = model(batch.ids, ctx, at=batch.at, targets=batch.targets, objective=batch.pairs.sums)
        found[numbers] = sums.double().cpu()
    if ranks > 1:
        found = fabric.all_reduce(found.to(device), reduce_op="sum").cpu()
    model.train(training)
    return found


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
    return float(total) / totals(rows)[1]


@torch.no_grad()
def row_losses(model: torch.nn.Module, rows: list[Row], device: torch.device, fabric: Any = None) -> list[float]:
    """Returns the loss of each row, in nats per trained token; the ranks of `fabric` share the work."""
    ranks, rank = (1, 0) if fabric is None else (fabric.world_size, fabric.global_rank)
    training, frame = model.training, model.frame
    model.eval()
    layout = lay_out(range(len(rows)), [sum(frame) + len(row.ids) for row in rows], ranks, APART, None)[rank]
    found = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for numbers in layout:
        if len(numbers) < 2:  # a long row, or none: its logits need not exist at one time
            batch = collate([rows[i] for i in numbers], *frame) if numbers else idle(rows[0], *frame)
            total = summed_loss(model, batch.to(device)).double()
            found[numbers] = total if numbers else 0.0
            continue
        batch = collate([rows[i] for i in numbers], *frame).to(device)
        logits = model(batch.ids, Context.packed(batch.lengths, device, batch.prompt_lengths), at=batch.at)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, batch.targets, reduction="none").double()
        parts = (losses if batch.weights is None else losses * batch.weights).split(
            [sum(rows[i].trained) for i in numbers]
        )
        found[numbers] = torch.stack([part.sum() for part in parts])
    if ranks > 1:
        found = fabric.all_reduce(found, reduce_op="sum")
    model.train(training)
    return [total / totals([row])[1] for total, row in zip(found.tolist(), rows, strict=True)]
