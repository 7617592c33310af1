"""Forward and backward passes that a GPU repeats: their thousands of kernels are recorded once, and started as one.

To start them one by one takes the processor longer than the GPU needs for short rows or small models. Kernels are
recorded for one size, so a micro-batch is filled up to the next size class: with a document that trains nothing, and
with targets that do not count. That adds zeros to the loss and to the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from litpeft.data.batches import Batch
from litpeft.generate.cuda_graph import record
from litpeft.model.attention import Documents
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.model.gpt import GPT
from litpeft.model.slots import is_empty
from litpeft.train.fused_block import HALF, fused_step, groups_of, kernels

LEAST, LEAST_DOCUMENTS = 128, 8  # of the smallest size class
FINENESS = 8  # size classes between a number of tokens and twice that
MOST_WORK = 2e13  # parameters times tokens of a pass above which the GPU has more to do than the processor
MOST_CLASSES = 24  # size classes that are recorded; others are computed kernel by kernel


@dataclass(frozen=True)
class Size:
    """The size class of a micro-batch."""

    tokens: int
    targets: int
    documents: int

    @classmethod
    def of(cls, batch: Batch) -> "Size":
        tokens, targets = rounded_up(batch.tokens, LEAST, FINENESS), rounded_up(len(batch.at), LEAST, 2)
        return cls(tokens, min(tokens, targets), rounded_up(len(batch.lengths) + 1, LEAST_DOCUMENTS, 1))


def rounded_up(n: int, least: int, fineness: int) -> int:
    """Returns the smallest size >= n: `least`, or one of `fineness` sizes from a power of two to the next."""
    if n <= least:
        return least
    step = max(1, (1 << (n - 1).bit_length() - 1) // fineness)
    return -(-n // step) * step


class RecordedPass:
    """The passes of one size class. What goes in is copied to where the recorded kernels read."""

    def __init__(self, model: GPT, size: Size):
        device = model.embed.weight.device
        self.model, self.size, self.replay = model, size, None
        self.ids, self.pos = (torch.zeros(1, size.tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.at, self.targets = (torch.zeros(size.targets, dtype=torch.int64, device=device) for _ in range(2))
        self.starts = torch.zeros(size.documents + 1, dtype=torch.int32, device=device)
        self.factor = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)

    def fill(self, batch: Batch, factor: float) -> None:
        """Copies a micro-batch to where it is read, filled up to the size class."""
        size, tokens, targets = self.size, batch.tokens, len(batch.at)
        rest, missing = size.tokens - tokens, size.targets - targets
        lengths = [*batch.lengths, rest, *(0 for _ in range(size.documents - len(batch.lengths) - 1))]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pos = torch.cat([torch.arange(length) for length in lengths])
        for target, whole in ((self.starts, starts), (self.pos, pos[None])):
            target.copy_(whole, non_blocking=True)
        self.ids[:, :tokens].copy_(batch.ids, non_blocking=True)
        self.ids[:, tokens:] = 0
        self.at[:targets].copy_(batch.at, non_blocking=True)
        self.targets[:targets].copy_(batch.targets, non_blocking=True)
        if missing:  # each at a place of its own: adding zeros to one place takes as long as adding anything
            self.at[targets:] = torch.arange(missing, device=self.at.device) % size.tokens
            self.targets[targets:] = -1
        self.factor.fill_(factor)

    def step(self) -> None:
        """Computes the loss, and adds its gradient times `factor` to the gradients."""
        bounds = (self.size.tokens, *(0 for _ in range(self.size.documents - 1)))  # where they begin is in `starts`
        ctx = Context(self.pos, Documents(bounds, self.starts))
        loss = self.model(self.ids, ctx, at=self.at, targets=self.targets)
        (loss * self.factor).backward()
        self.loss.copy_(loss.detach())


class RecordedPasses:
    """All size classes of a run. They write into the same gradients, and share memory."""

    def __init__(self, model: GPT):
        self.model, self.pool = model, None
        self.sizes: dict[Size, RecordedPass] = {}
        self.most_tokens = MOST_WORK / sum(parameter.numel() for parameter in model.parameters())
        self.parameters = list(trainable(model).values())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    @classmethod
    def of(cls, model: GPT) -> "RecordedPasses | None":
        """Returns the passes of a model on a GPU whose blocks are all fused, else None."""
        fused = type(model) is GPT and model.fused is fused_step and model.dtype in HALF and kernels() is not None
        plain = is_empty(model.head.slot) and is_empty(model.after_embed) and model.head.bias is None
        rotates = model.positions is None and model.config.turned == model.config.head_dim
        around = (*model.embed.parameters(), *model.norm.parameters(), *model.head.parameters())
        if not (fused and plain and rotates) or any(parameter.requires_grad for parameter in around):
            return None
        return cls(model) if all(groups_of(block) is not None for block in model.blocks) else None

    def __call__(self, batch: Batch, factor: float) -> Tensor | None:
        """Adds the gradient of factor * loss to the gradients, and returns the summed loss; None for too large ones."""
        if batch.tokens > self.most_tokens or not len(batch.at):
            return None
        size = Size.of(batch)
        known = size in self.sizes
        run = self.sizes[size] = self.sizes.get(size) or RecordedPass(self.model, size)
        run.fill(batch, factor)
        self.hold_gradients()
        if known and run.replay is None and sum(one.replay is not None for one in self.sizes.values()) < MOST_CLASSES:
            run.replay = self.record(run.step)
        (run.replay or run.step)()  # the first time computes the same, and makes ready what cannot be recorded
        return run.loss.clone()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Returns what repeats `step` on the GPU."""
        torch.cuda.empty_cache()  # recorded kernels have memory of their own
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return record(step, self.pool)

    def hold_gradients(self) -> None:
        """Makes the tensors that the recorded kernels add to the gradients of the parameters."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is gradient:
                continue
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
