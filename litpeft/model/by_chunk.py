"""Layers that read a text chunk by chunk: what they do with documents, caches and gradients.

What a layer computes is its `piece(tokens, weights, group, memory)`: of a group of chunks it returns y (M, C, out) and
the matrices of its documents after them. `tokens` are tensors with a row a token, of which a convolution reads the
first; y has the shape of the second. `weights` are the parameters; a bias that the layer lacks is None.

Letters: B rows, T new tokens, N tokens of all rows, M chunks, C tokens of a chunk, W width of the convolution.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.chunks import Chunks, Group
from litpeft.model.context import Context

Weights = Sequence[Tensor | None]
Piece = Callable[[Sequence[Tensor], Weights, Group, Tensor], tuple[Tensor, Tensor]]


class Core(nn.Module):
    """What a layer makes of its projections, without parameters of its own."""

    def forward(self, tokens: Sequence[Tensor], weights: Weights, ctx: Context, attn: nn.Module) -> Tensor:
        """tokens (B, T, ...) -> y (B, T, out). `attn` has a `piece`, the number of its `layer` and its `sizes`."""
        z = tokens[1]
        if ctx.cache is None:
            rows = [x.flatten(0, 1) for x in tokens]
            return _Read.apply(ctx.chunks, attn.piece, attn.sizes.matrices, len(rows), *rows, *weights).view_as(z)
        cache = ctx.cache[attn.layer]
        before, memory = cache.earlier(ctx)
        inputs = torch.cat((before, tokens[0].to(before.dtype)), 1)
        y, memory = read([x.flatten(0, 1) for x in (inputs, *tokens[1:])], weights, ctx.chunks, memory, attn.piece)
        cache.remember(inputs, memory, ctx)
        return y.view_as(z)


def read(
    tokens: Sequence[Tensor],
    weights: Weights,
    chunks: Chunks,
    memory: Tensor,
    piece: Piece,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y (N, out) and each document's matrices after its tokens, for those before them (documents, ...).

    The first of `tokens` may have more rows, as `chunks` say. The matrices before each group are put into `kept`, but
    for the first group of a batch.
    """
    y, after = torch.zeros_like(tokens[1]), torch.empty_like(memory)  # zeros at what is padding
    for batch in chunks.batches:
        held, ended = memory[batch.documents], []
        for number, group in enumerate(batch.groups):
            ended.append(held[group.counts[0] :])  # of documents without a chunk more
            held = held[: group.counts[0]]
            if kept is not None and number:
                kept.append(held)
            part, held = piece(gathered(tokens, group), weights, group, held)
            group.write(y, part)
        after.index_copy_(0, batch.documents, torch.cat([held, *reversed(ended)]))
    return y, after


def gathered(tokens: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Returns the tokens of a group: the first (M, W - 1 + C, ...), the others (M, C, ...)."""
    return [tokens[0][group.window], *(x[group.token] for x in tokens[1:])]


class _Read(torch.autograd.Function):
    """`read` of texts from their start. It keeps its inputs and the matrices before each group, and computes again."""

    @staticmethod
    def forward(ctx, chunks: Chunks, piece: Piece, matrices: tuple[int, ...], count: int, *inputs: Tensor) -> Tensor:
        z, kept = inputs[1], []
        wide = torch.promote_types(z.dtype, torch.float32)
        documents = sum(len(batch.documents) for batch in chunks.batches)
        memory = torch.zeros(documents, *matrices, dtype=wide, device=z.device)
        y, _ = read(inputs[:count], inputs[count:], chunks, memory, piece, kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.read = chunks, piece, count, memory[:0]
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        chunks, piece, count, empty = ctx.read
        needed, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        inputs, kept = saved[: len(needed)], list(saved[len(needed) :])
        grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
        for batch in reversed(chunks.batches):
            dmemory = empty
            for number, group in reversed([*enumerate(batch.groups)]):
                memory = kept.pop() if number else empty.new_zeros(group.counts[0], *empty.shape[1:])
                memory = memory.detach().requires_grad_(number > 0)
                given = [*gathered(inputs[:count], group), *inputs[count:]]
                given = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(given, needed, strict=True)]
                with torch.enable_grad():
                    ends = piece(given[:count], given[count:], group, memory)
                dmemory = torch.cat((dmemory, dmemory.new_zeros(len(memory) - len(dmemory), *dmemory.shape[1:])))
                into = [x for x in (*given, memory) if x is not None and x.requires_grad]
                back = [dy[group.token].where(group.real[..., None], 0), dmemory]
                if not ends[1].requires_grad:  # where only what comes after the matrices trains
                    ends, back = ends[:1], back[:1]
                found = iter(torch.autograd.grad(ends, into, back))
                parts = [next(found) if need else None for need in needed]
                dmemory = next(found, dmemory)
                add(grads, parts, group, count)
        return None, None, None, None, *grads


def add(grads: Weights, parts: Weights, group: Group, count: int) -> None:
    """Adds what a group says of the gradients of its inputs, of which the first `count` are tokens."""
    for at, (grad, part) in enumerate(zip(grads, parts, strict=True)):
        if part is None:
            continue
        if at == 0:
            grad.index_add_(0, group.window.flatten(), part.flatten(0, 1))
        elif at < count:
            group.write(grad, part)
        else:
            grad += part
