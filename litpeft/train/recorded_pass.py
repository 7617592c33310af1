"""Forward and backward passes as CUDA graphs: their thousands of kernels are recorded once and launched as one.

For short rows or small models launching them one by one takes the CPU longer than the GPU needs. A graph has fixed
shapes, so a micro-batch is padded to the next size class, with a document that trains nothing and with targets that are
ignored; these add zeros to the loss and to the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litpeft.data.batches import Batch
from litpeft.generate.cuda_graph import record
from litpeft.model.attention import Documents
from litpeft.model.context import Context
from litpeft.model.delta import Method, trainable
from litpeft.model.gpt import GPT
from litpeft.model.slots import is_empty
from litpeft.train.fused_block import HALF, FusedStep, groups_of, kernels

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

LEAST, LEAST_DOCUMENTS = 128, 8  # of the smallest size class
FINENESS = 8  # size classes from a number of tokens to twice that
MOST_WORK = 2e13  # parameters times tokens of a pass; above it the GPU, not the CPU, limits the speed
MOST_CLASSES = 24  # size classes that are recorded; others are launched kernel by kernel


@dataclass(frozen=True)
class Size:
    """The size class of a micro-batch."""

    tokens: int
    targets: int
    documents: int
    weighted: bool = False

    @classmethod
    def of(cls, batch: Batch) -> "Size":
        tokens, targets = rounded_up(batch.tokens, LEAST, FINENESS), rounded_up(len(batch.at), LEAST, 2)
        documents = rounded_up(len(batch.lengths) + 1, LEAST_DOCUMENTS, 1)
        return cls(tokens, min(tokens, targets), documents, batch.weights is not None)


def rounded_up(n: int, least: int, fineness: int) -> int:
    """Returns the smallest size class >= n: `least`, or one of `fineness` between two powers of two."""
    if n <= least:
        return least
    step = max(1, (1 << (n - 1).bit_length() - 1) // fineness)
    return -(-n // step) * step


class RecordedPass:
    """The forward and backward pass of one size class, with buffers for its inputs, which the graph reads."""

    def __init__(self, model: GPT, size: Size):
        device = model.embed.weight.device
        self.model, self.size, self.replay = model, size, None
        self.ids, self.pos = (torch.zeros(1, size.tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.at, self.targets = (torch.zeros(size.targets, dtype=torch.int64, device=device) for _ in range(2))
        self.weights = torch.zeros(size.targets, dtype=torch.float64, device=device) if size.weighted else None
        self.starts = torch.zeros(size.documents + 1, dtype=torch.int32, device=device)
        self.factor = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)

    def fill(self, batch: Batch, factor: float) -> None:
        """Copies a micro-batch into the buffers, padded to the size class."""
        size, tokens, targets = self.size, batch.tokens, len(batch.at)
        rest, missing = size.tokens - tokens, size.targets - targets
        lengths = [*batch.lengths, rest, *(0 for _ in range(size.documents - len(batch.lengths) - 1))]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pos = torch.cat([torch.arange(length) for length in lengths])
        for target, values in ((self.starts, starts), (self.pos, pos[None])):
            target.copy_(values, non_blocking=True)
        self.ids[:, :tokens].copy_(batch.ids, non_blocking=True)
        self.ids[:, tokens:] = 0
        self.at[:targets].copy_(batch.at, non_blocking=True)
        self.targets[:targets].copy_(batch.targets, non_blocking=True)
        if self.weights is not None:
            self.weights[:targets].copy_(batch.weights, non_blocking=True)
        if missing:  # at different positions, since atomic additions to one position are slow
            self.at[targets:] = torch.arange(missing, device=self.at.device) % size.tokens
            self.targets[targets:] = -1
        self.factor.fill_(factor)

    def step(self) -> None:
        """Computes the loss and adds its gradient times `factor` to the gradients."""
        bounds = (self.size.tokens, *(0 for _ in range(self.size.documents - 1)))  # `starts` has the true offsets
        ctx = Context(self.pos, Documents(bounds, self.starts))
        weights = None if self.weights is None else lambda: self.weights
        loss = self.model(self.ids, ctx, at=self.at, targets=self.targets, weights=weights)
        (loss * self.factor).backward()
        self.loss.copy_(loss.detach())


class RecordedPasses:
    """All size classes of a run. They add to the same gradients and share a memory pool.

    No other pass gets memory of that pool. So recorded passes of n tokens hold twice what a pass of n tokens needs.
    """

    def __init__(self, model: GPT):
        self.model, self.pool = model, None
        self.sizes: dict[Size, RecordedPass] = {}
        self.most_tokens = MOST_WORK / sum(parameter.numel() for parameter in model.parameters())
        self.parameters = list(trainable(model).values())
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    @classmethod
    def of_run(cls, model: GPT, fabric: "Fabric", method: Method, pairs: bool) -> "RecordedPasses | None":
        """Returns the passes of a run on one GPU in which each pass is as the one that was recorded, else None.

        Passes over `pairs` of answers, whose loss is not a sum over tokens, are not recorded.
        """
        alone = fabric.world_size == 1 and fabric.device.type == "cuda"
        unscaled = alone and fabric.strategy.precision.precision == "32-true"  # nothing scales or casts
        same = not (pairs or method.defines("penalty") or method.defines("training_step"))
        return cls.of(model) if unscaled and same else None

    @classmethod
    def of(cls, model: GPT) -> "RecordedPasses | None":
        """Returns the passes of a model if it is on a GPU and all its blocks are fused, else None.

        One that keeps activations in host memory is not recorded: a graph cannot allocate that.
        """
        fused = (
            model.recompute != "offload"
            and type(model) is GPT
            and isinstance(model.fused, FusedStep)
            and model.dtype in HALF
            and kernels() is not None
        )
        plain = (
            not model.noise and is_empty(model.head.slot) and is_empty(model.after_embed) and model.head.bias is None
        )
        rotates = model.positions is None and model.config.rotary_size == model.config.head_dim
        rotates = rotates and model.config.turning_length is None  # the lengths of a pass's documents are not its own
        around = (*model.embed.parameters(), *model.norm.parameters(), *model.head.parameters())
        if not (fused and plain and rotates) or any(parameter.requires_grad for parameter in around):
            return None
        return cls(model) if all(groups_of(block) is not None for block in model.blocks) else None

    def __call__(self, batch: Batch, factor: float) -> Tensor | None:
        """Adds the gradient of factor * loss to the gradients and returns the summed loss; None: not for this batch."""
        if batch.tokens > self.most_tokens or not len(batch.at):
            return None
        size = Size.of(batch)
        known = size in self.sizes
        run = self.sizes[size] = self.sizes.get(size) or RecordedPass(self.model, size)
        run.fill(batch, factor)
        self.hold_gradients()
        if known and run.replay is None and sum(one.replay is not None for one in self.sizes.values()) < MOST_CLASSES:
            run.replay = self.record(run.step)
        (run.replay or run.step)()  # the first pass of a size class warms up what cannot be recorded
        return run.loss.clone()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that replays `step` on the GPU."""
        torch.cuda.empty_cache()  # a graph has memory of its own
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return record(step, self.pool)

    def hold_gradients(self) -> None:
        """Makes the graphs' gradient tensors the gradients of the parameters, with the values that they have."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is gradient:
                continue
            if parameter.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
