"""Causal attention in which no token sees another document: one function, a few backends.

Letters: B rows, T new tokens, S keys, H query heads, G key/value heads, D head size, m tokens of a document, padded.
"""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from litpeft.model.kernels import native

QUERY_CHUNK = 192  # queries of a short document that one product takes
GROUPED_TOKENS = 64  # new tokens of a row with a KV cache, up to which the heads that share a key are one product
MIN_ROWS = 4  # rows of a product below which torch's CPU kernel sums in another order
SHORT = 512  # tokens; longer documents go to the fused kernel, which holds no attention weights
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LONGEST = 2048  # tokens of a document that the C++ kernel takes: its backward pass allocates all weights of a head


@dataclass  # not frozen: Fabric's mixed precision copies what forward is given, and cannot copy a frozen one
class Documents:
    """The documents of a packed row, one after the other."""

    lengths: tuple[int, ...]  # tokens
    _starts: Tensor | None = None
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def starts(self, device: torch.device) -> Tensor:
        """Returns the start of each document and the end of the last (documents + 1,), int32; cached for all layers."""
        if self._starts is None:
            self._starts = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(device, non_blocking=True)
        return self._starts

    def cut(self, first: int, size: int) -> "Documents":
        """Returns the documents in pieces: of each the first `first` tokens, then `size` at a time, then the rest."""
        pieces: list[int] = []
        for length in self.lengths:
            ends = [*range(first, length, size), length]
            pieces += [end - start for start, end in pairwise([0, *ends])]
        return Documents(tuple(pieces))

    def bias(self, m: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns what is added to a document's scores (m, m): minus infinity where masked; cached for all layers."""
        if (m, window, dtype) not in self._biases:
            position = torch.arange(m)[None]
            unseen = ~causal_mask(position, position, window)[0]
            self._biases[m, window, dtype] = torch.zeros(m, m, dtype=dtype).masked_fill_(unseen, float("-inf"))
        return self._biases[m, window, dtype]


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Returns (B, T, S), True where the query at position `queries` (B, T) may see the key at `keys` (B, S)."""
    distance = queries[:, :, None] - keys[:, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    documents: Documents | None,
    window: int | None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v as (B, H, T, D); q is (B, H, T, D), k and v are (B, G, S, D).

    `mask` (B, 1, T, S) is added to the scores, or True where a query sees a key. Without it a query sees itself and the
    earlier tokens of its document (of its row if `documents` is None), at most `window` of them.
    With a `cap` scores s become cap * tanh(s / cap). `sinks` (H,) are one more score in the softmax, of no token.
    """
    if cap is not None or sinks is not None:
        return _plain(q, k, v, mask, documents, window, cap, sinks)
    if mask is not None and q.size(2) <= GROUPED_TOKENS:
        return _grouped(q, k, v, mask)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    library = None if documents is None or max(documents.lengths) > LONGEST else native(q, k, v)
    if library is not None:
        return _Native.apply(q, k, v, documents.starts(q.device), window)
    half_on_gpu = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if half_on_gpu and documents is not None and window is None and len(set(documents.lengths)) == 1:
        return _batch(q, k, v, len(documents.lengths))
    if documents is None or len(documents.lengths) == 1:
        return _dense(q, k, v, window)
    if half_on_gpu:
        return _varlen(q, k, v, documents, window)
    return _by_length(q, k, v, documents, window)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Documents | None,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Holds all scores of a document: no fused kernel of torch caps them, or takes one of no token."""
    if mask is None and documents is not None and len(documents.lengths) > 1:
        parts = zip(*(x.split(documents.lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([_plain(*part, None, None, window, cap, sinks) for part in parts], 2)
    if mask is None:
        position = torch.arange(q.size(2), device=q.device)[None]
        mask = causal_mask(position, position, window)[:, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    scores = q.unflatten(1, (k.size(1), -1)) @ k[:, :, None].transpose(-1, -2) * q.size(-1) ** -0.5
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)) + mask[:, None]
    if sinks is not None:
        own = sinks.to(scores.dtype).view(1, k.size(1), -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, own), -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    shares = scores.softmax(-1, dtype=wide).to(q.dtype)[..., : k.size(2)]
    return (shares @ v[:, :, None]).flatten(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For few tokens of each row, as in decoding: the query heads that share a key are rows of one product.

    A token's result does not depend on how many tokens come with it.
    """
    kv_heads = k.size(1)
    rows = q.reshape(len(q), kv_heads, -1, q.size(3))
    count, padding = rows.size(2), max(0, MIN_ROWS - rows.size(2))
    if q.size(2) > 1:
        mask = F.pad(mask.repeat(1, 1, q.size(1) // kv_heads, 1), (0, 0, 0, padding))
    if padding:
        rows = F.pad(rows, (0, 0, 0, padding))
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)[:, :, :count].reshape(q.shape)


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Every row is one document from its first token; padding comes after it, where no query of it looks."""
    if window is None or q.size(2) <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    position = torch.arange(q.size(2), device=q.device)[None]
    mask = causal_mask(position, position, window)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _batch(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Documents of equal length on a GPU, as a batch: cuDNN's kernel, the fastest on Hopper, takes no others."""
    heads, size = q.size(1), q.size(3)
    rows = [x.transpose(1, 2).reshape(count, -1, x.size(1), size).transpose(1, 2) for x in (q, k, v)]
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        y = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).reshape(1, -1, heads, size).transpose(1, 2)


class _Native(torch.autograd.Function):
    """The documents of a packed row by the C++ kernel: without padding, and without keeping the attention weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None) -> Tensor:
        y, log_sum = native(q, k, v).attention(q[0], k[0], v[0], starts, window)
        ctx.window = window
        ctx.save_for_backward(q, k, v, log_sum, starts)
        return y.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sum, starts = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        gradients = native(q, k, v).attention_backward(dy[0], q[0], k[0], v[0], log_sum, starts, ctx.window)
        return *(x.transpose(0, 1)[None] for x in gradients), None, None


def _by_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Documents of like length are padded at the end into one batch, so none is computed against another."""
    pieces: list[Tensor] = [q] * len(documents.lengths)
    parts = [x[0].transpose(0, 1).split(documents.lengths) for x in (q, k, v)]  # each document (m, heads, D)
    alike: dict[int, list[int]] = {}  # documents whose lengths differ by less than 64 tokens
    for number, length in enumerate(documents.lengths):
        alike.setdefault((length + 63) // 64, []).append(number)
    for group in alike.values():
        padded = [pad_sequence([part[i] for i in group], batch_first=True).transpose(1, 2) for part in parts]
        short_half = padded[0].size(2) <= SHORT and q.dtype in (torch.bfloat16, torch.float16)
        if short_half:
            y = _products(*padded, documents.bias(padded[0].size(2), window, q.dtype))
        else:
            y = _dense(*padded, window)
        for row, number in enumerate(group):
            pieces[number] = y[row, :, : documents.lengths[number]].transpose(0, 1)
    return torch.cat(pieces).transpose(0, 1)[None]


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Does what `_dense` does, by batched products; q is (B, H, m, D), k and v are (B, G, m, D), bias (m, m).

    For short documents in half precision on the CPU it takes a third of the time of the fused kernel, forward and
    backward (measured). The queries are split into chunks, each over the keys up to its last query, so that few masked
    scores are computed.
    """
    m, size = q.shape[2:]
    parts = -(-m // QUERY_CHUNK)
    ends = [-(-m * part // parts) for part in range(parts + 1)]
    spans = [(q[:, :, a:b], k[:, :, :b], v[:, :, :b], bias[a:b, :b]) for a, b in pairwise(ends)]
    done = [_Part.apply(*span, size**-0.5) for span in spans]
    return torch.cat(done, 2) if parts > 1 else done[0]


class _Part(torch.autograd.Function):
    """softmax(scale q k^T + bias) v; the query heads that share a key are rows of one product.

    The backward pass recomputes the attention weights, for some 3 % of the time of a step: keeping them took twice the
    memory of q, k and v.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, bias)
        rows, k, v = _Part.rows(q, k), k.flatten(0, 1), v.flatten(0, 1)
        return torch.bmm(_Part.weights(rows, k, bias, scale), v).view(q.shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        rows, dy, shape = _Part.rows(q, k), _Part.rows(dy, k), k.shape
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        weights = _Part.weights(rows, k, bias, ctx.scale)
        dv = torch.bmm(weights.transpose(1, 2), dy)
        dweights = torch.bmm(dy, v.transpose(1, 2))
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), rows)
        return dq.view(q.shape), dk.view(shape), dv.view(shape), None, None

    @staticmethod
    def rows(x: Tensor, k: Tensor) -> Tensor:
        """(B, H, m, D) -> (B * G, H / G * m, D)"""
        return x.reshape(len(k) * k.size(1), -1, k.size(3))

    @staticmethod
    def weights(rows: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
        bias = bias.repeat(rows.size(1) // len(bias), 1)
        return torch.baddbmm(bias, rows, k.transpose(1, 2), alpha=scale).softmax(-1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Flash attention's kernel for ragged batches; half precision on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn  # here, as it loads torch's compiler, which takes a second

    starts, longest = documents.starts(q.device), max(documents.lengths)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]  # (T, heads, D)
    back = -1 if window is None else window - 1
    y = varlen_attn(*rows, starts, starts, longest, longest, window_size=(back, 0), enable_gqa=True)
    return y.transpose(0, 1)[None]
