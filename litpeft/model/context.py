"""The context of one forward pass: positions, documents, KV cache and mask.

Letters: B rows, T new tokens, S keys, D head size, R of them that rotate, G key/value heads.
"""

from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from litpeft.model.attention import Documents, causal_mask
from litpeft.model.chunks import Chunks
from litpeft.model.config import ModelConfig

KEYS = 64  # the length of a cache, and of what attention reads of it, is a multiple of this


class KVCache:
    """Keys and values of one layer, each at its position; positions that a row has not written yet are masked.

    A layer that reads those of another has an empty one, and so has one without attention.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        number: int = 0,
    ):
        """`number` is that of the layer."""
        length, layer = -(-length // KEYS) * KEYS, config.layer(number)
        heads = config.kv_heads(layer) if layer.attends and layer.keys_of is None else 0
        shape = (rows, heads, length, config.head_size(layer))
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Returns how many positions it has memory for."""
        return self.k.size(2)

    def take(self, other: "KVCache") -> None:
        """Takes over what a shorter one holds."""
        self.k[:, :, : other.length], self.v[:, :, : other.length] = other.k, other.v

    def of_rows(self, rows: slice) -> "KVCache":
        """Returns a view of some rows: what is written to it is written here."""
        part = copy(self)
        part.k, part.v = self.k[rows], self.v[rows]
        return part

    def swap(self, one: int, other: int, length: int) -> None:
        """Lets two rows change places, of which at most `length` positions are written."""
        for tensor in (self.k, self.v):
            exchange(tensor[:, :, :length], one, other)

    def update(self, k: Tensor, v: Tensor, ctx: "Context") -> tuple[Tensor, Tensor]:
        """Writes k and v (B, G, T, D) at their positions; returns the keys and values (B, G, end, D) so far."""
        if ctx.start is not None:
            self.k.narrow(2, ctx.start, k.size(2)).copy_(k)  # faster than an index
            self.v.narrow(2, ctx.start, v.size(2)).copy_(v)
        else:
            row = torch.arange(k.size(0), device=k.device)[:, None]
            self.k[row, :, ctx.pos] = k.transpose(1, 2).to(self.k.dtype)  # autocast gives other types than the cache's
            self.v[row, :, ctx.pos] = v.transpose(1, 2).to(self.v.dtype)
        return self.k.narrow(2, 0, ctx.keys), self.v.narrow(2, 0, ctx.keys)


class StateCache:
    """What a layer without attention knows of each row's text: the last inputs of its convolution, and its matrices.

    It is of the whole text that was read: a shorter one has to be read again.
    """

    def __init__(self, rows: int, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, number: int):
        """`number` is that of the layer."""
        layer, matrices, channels = config.layer(number), (0,), config.d_model
        if (sizes := layer.chunked) is not None:
            matrices, channels = sizes.matrices, sizes.channels
        width, wide = (sizes or layer.convolution).width, torch.promote_types(dtype, torch.float32)
        self.memory = torch.zeros(rows, *matrices, dtype=wide, device=device)
        self.before = torch.zeros(rows, width - 1, channels, dtype=dtype, device=device)

    length = None  # it has memory for any number of positions

    def take(self, other: "StateCache") -> None:
        """Takes over what another one holds."""
        self.memory, self.before = other.memory, other.before

    def of_rows(self, rows: slice) -> "StateCache":
        """Returns a view of some rows: what is written to it is written here."""
        part = copy(self)
        part.memory, part.before = self.memory[rows], self.before[rows]
        return part

    def swap(self, one: int, other: int, length: int) -> None:
        """Lets two rows change places."""
        for tensor in (self.memory, self.before):
            exchange(tensor, one, other)

    def earlier(self, ctx: "Context") -> tuple[Tensor, Tensor]:
        """Returns the last inputs (B, W - 1, channels) and the matrices; zeros for rows that begin with this call."""
        begins = ctx.pos[:, 0] == 0
        held = self.before, self.memory
        return tuple(x.masked_fill(begins.view(-1, *[1] * (x.dim() - 1)), 0) for x in held)

    def remember(self, inputs: Tensor, memory: Tensor | None, ctx: "Context") -> None:
        """Holds what is known after this call: `inputs` (B, W - 1 + T, channels) are the earlier ones and its own."""
        last, device = self.before.size(1), inputs.device
        if ctx.counts is None:
            self.before.copy_(inputs[:, inputs.size(1) - last :])
        else:
            at = torch.tensor(ctx.counts, device=device)[:, None] + torch.arange(last, device=device)
            self.before.copy_(inputs.gather(1, at[..., None].expand(-1, -1, inputs.size(2))))
        if memory is not None:
            self.memory.copy_(memory)


class BothCaches:
    """What a layer knows that has attention and a state side by side."""

    def __init__(self, keys: KVCache, state: StateCache):
        self.keys, self.state = keys, state
        self.update, self.earlier, self.remember = keys.update, state.earlier, state.remember

    @property
    def length(self) -> int:
        """Returns how many positions it has memory for."""
        return self.keys.length

    def take(self, other: "BothCaches") -> None:
        """Takes over what a shorter one holds."""
        self.keys.take(other.keys), self.state.take(other.state)

    def of_rows(self, rows: slice) -> "BothCaches":
        """Returns a view of some rows: what is written to it is written here."""
        return BothCaches(self.keys.of_rows(rows), self.state.of_rows(rows))

    def swap(self, one: int, other: int, length: int) -> None:
        """Lets two rows change places, of which at most `length` positions are written."""
        self.keys.swap(one, other, length), self.state.swap(one, other, length)


Cache = KVCache | StateCache | BothCaches


def layer_cache(
    rows: int, length: int, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, number: int
) -> Cache:
    """Returns an empty cache for a layer."""
    layer = config.layer(number)
    state = StateCache(rows, config, dtype, device, number) if layer.recurs else None
    if state is not None and not layer.attends:
        return state
    keys = KVCache(rows, length, config, dtype, device, number)
    return keys if state is None else BothCaches(keys, state)


def exchange(rows: Tensor, one: int, other: int) -> None:
    """Lets two rows of a tensor change places."""
    rows[[one, other]] = rows[[other, one]]


@dataclass
class Context:
    """What the blocks need to know of one call; made by the caller, completed by GPT.forward.

    Layers of different kinds are given copies, with the `mask` and `rope` of their kind.
    """

    pos: Tensor  # (B, T) position of each token in its document
    documents: Documents | None = None  # of the one packed row; None = every row is one document
    prompt_lengths: Tensor | None = None  # (B, T) or (B, 1) tokens before the first answer of each token's document
    adapter: Tensor | None = None  # (B,) the number of each row's run, where several are beside one base; 0 = none
    cache: list[Cache] | None = None  # one for each layer, while generating
    end: int = 0  # with a cache: one more than the highest position of this call
    start: int | None = None  # with a cache: the position of every row's first token, if they are all the same
    keys: int = 0  # with a cache: how many of its keys attention reads, masked ones included
    mask: Tensor | None = None  # (B, 1, T, S), added to the scores; None = causal within the document
    recompute: bool = False  # activation checkpointing: blocks run again in the backward pass
    virtual_tokens: int = 0  # first positions of each document that hold no tokens of the text
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin of ops.rotate, (B, 1, T, R); None = nothing rotates
    query_growth: Tensor | None = None  # (B, 1, T, 1) what queries are multiplied by
    shared: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> its k and v, which others read
    layer_input: Tensor | None = None  # (B, T, size) of model/layer_inputs.py, for one layer
    counts: tuple[int, ...] | None = None  # with a cache: new tokens of each row, before its padding; None = all T
    chunks: Chunks | None = None  # the tokens as layers of linear attention and Mamba's compute them

    @classmethod
    def rows(cls, ids: Tensor) -> "Context":
        """Returns the context of rows (B, T) that each hold one document from its start."""
        return cls(torch.arange(ids.size(1), device=ids.device).expand_as(ids))

    @classmethod
    def packed(
        cls, lengths: tuple[int, ...], device: torch.device, prompt_lengths: tuple[int, ...] | None
    ) -> "Context":
        """Returns the context of one row (1, T) that holds documents of these lengths one after the other."""
        prompts, pos = None, torch.cat([torch.arange(n, device=device) for n in lengths])
        if prompt_lengths is not None:
            parts = [torch.full((n,), prompt) for n, prompt in zip(lengths, prompt_lengths, strict=True)]
            prompts = torch.cat(parts)[None].to(device, non_blocking=True)
        return cls(pos[None], Documents(lengths), prompts)

    def look_back(self, tokens: int, window: int | None, dtype: torch.dtype) -> None:
        """Sets `keys`, and the mask of what the new `tokens` of each row see of the cache.

        Unless the rows begin here, `keys` is a multiple of KEYS: then the sums of a token have the same bits, whether
        it comes alone or with a few others.
        """
        self.keys = self.end
        if tokens < self.end:
            self.keys = -(-self.end // KEYS) * KEYS
            keys = torch.arange(self.keys, device=self.pos.device)[None]
            seen = causal_mask(self.pos, keys, window)[:, None]
            self.mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def cut(self, width: int) -> None:
        """Sets `chunks`, for layers with a convolution of that width."""
        rows, tokens = self.pos.shape
        lengths = self.counts or (tokens,) * rows if self.documents is None else self.documents.lengths
        starts = range(0, rows * tokens, tokens) if self.documents is None else [0, *accumulate(lengths)]
        self.chunks = Chunks.of(starts, lengths, width, self.pos.device, 0 if self.cache is None else width - 1)

    def reach(self) -> int:
        """Returns one more than the highest position, without reading from the device."""
        if self.cache is not None:
            return self.end
        return self.pos.size(1) if self.documents is None else max(self.documents.lengths)
