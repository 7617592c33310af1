"""The functions of the C++ files, on tensors in a CPU's memory, in bfloat16 unless another type is named.

Letters: B rows, T tokens, S keys, D head size, R of it that rotates, d model width, H query heads, G key/value heads.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ALL = 1 << 62  # keys: the window of a model without one
LAYERS = 3  # at most, that read the same input


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


def _numbers(*names: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in names]


class AffineStruct(Structure):
    """`Affine` of products.h."""

    _fields_ = [*_pointers("gain", "bias", "a", "b"), *_numbers("rank")]


class PackedLinearsStruct(Structure):
    """`PackedLinears` of products.h."""

    _fields_ = [
        *_pointers("weight", "scale", "shift", "codes", "affines"),
        *_numbers("kind", "inputs", "outputs", "span"),
    ]


class BlockStruct(Structure):
    """`Block` of decode.cpp."""

    _fields_ = [
        *((name, PackedLinearsStruct) for name in ("qkv", "o", "gate_up", "down")),
        *_pointers("norm1", "norm2"),
        *((name, c_double) for name in ("eps1", "eps2")),
        *_numbers("heads", "kv_heads", "size", "rotary_dim", "window"),
    ]


class AttentionStruct(Structure):
    """`Attention` of attention.cpp."""

    _fields_ = [
        *_pointers("q", "k", "v", "y", "log_sum", "dy", "dq", "dk", "dv", "starts"),
        *_numbers(*(f"{name}_{step}" for name in ("q", "k", "v", "dy") for step in ("head", "token"))),
        *_numbers("documents", "tokens", "heads", "kv_heads", "size", "window"),
    ]


class LowRankStruct(Structure):
    """`LowRank` of lora.cpp."""

    _fields_ = [
        *_pointers("x", "a", "h"),
        *((name, c_void_p * LAYERS) for name in ("b", "y", "dy")),
        *_pointers("dx", "da"),
        ("db", c_void_p * LAYERS),
        *((name, c_int64 * LAYERS) for name in ("outputs", "ranks")),
        *_numbers("layers", "rows", "inputs", "rank"),
    ]


class Library:
    """The compiled functions, of contiguous tensors; q, k, v and dy of attention, and x of rotate, need not be."""

    def __init__(self, file: Path):
        library, pointer, number = ctypes.CDLL(str(file)), c_void_p, c_int64
        arguments = {
            "product": [POINTER(PackedLinearsStruct), *[pointer] * 2, *[number] * 2],
            "block": [POINTER(BlockStruct), *[pointer] * 8, *[number] * 4],
            "attention": [POINTER(AttentionStruct), number],
            "low_rank": [POINTER(LowRankStruct), *[number] * 2],
            "swiglu": [*[pointer] * 3, *[number] * 2],
            "swiglu_backward": [*[pointer] * 5, *[number] * 2],
            "norm": [*[pointer] * 2, c_double, *[pointer] * 2, *[number] * 3],
            "norm_backward": [*[pointer] * 6, *[number] * 3],
            "rotate": [pointer, *[number] * 2, *[pointer] * 3, *[number] * 6],
            "cross_entropy": [*[pointer] * 3, *[number] * 3],
        }
        for name, types in arguments.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
            setattr(self, f"_{name}", function)

    # 1. decoding

    def product(self, linears: PackedLinearsStruct, x: Tensor) -> Tensor:
        """Returns W x with the first of the affine maps, for x (..., in): (..., out)."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], linears.outputs))
        self._product(linears, x.data_ptr(), y.data_ptr(), x.numel() // linears.inputs, torch.get_num_threads())
        return y

    def block(
        self,
        block: BlockStruct,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        affine: Tensor | None = None,
    ) -> Tensor:
        """Returns a block's output for x (B, T, d), whose tokens are at `positions` (B, T), in int64.

        `rope` is cos and sin of ops.rotate, (B, 1, T, R); new keys and values are written into k and v (B, G, S, D).
        `affine` (B,), in int64, are the numbers of the rows' affine maps in each product; None: the first for all.
        """
        y, (rows, tokens, _) = torch.empty_like(x), x.shape
        tensors = (t.data_ptr() for t in (x, y, k, v, positions, *rope))
        numbers = None if affine is None else affine.data_ptr()
        self._block(block, *tensors, numbers, rows, tokens, k.size(2), torch.get_num_threads())
        return y

    # 2. training

    def attention(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Returns the output (T, H, D) of attention, and the log-sum-exp (H, T) of the scores, in float32.

        Documents lie at `starts` (documents + 1,), in int32. q is (H, T, D), k and v are (G, T, D), and the D numbers
        of a head are contiguous.
        """
        heads, tokens, size = q.shape
        y, log_sum = q.new_empty(tokens, heads, size), q.new_empty(heads, tokens, dtype=torch.float32)
        tensors = {"q": q, "k": k, "v": v, "y": y, "log_sum": log_sum, "starts": starts}
        self._attention(_attention(tensors, window), torch.get_num_threads())
        return y, log_sum

    def attention_backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sum: Tensor, starts: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q as (T, H, D) and of k and v as (T, G, D), for dy (H, T, D)."""
        dq, dk, dv = (x.new_empty(x.size(1), x.size(0), x.size(2)) for x in (q, k, v))
        tensors = {"q": q, "k": k, "v": v, "log_sum": log_sum, "starts": starts, "dy": dy, "dq": dq, "dk": dk, "dv": dv}
        self._attention(_attention(tensors, window), torch.get_num_threads())
        return dq, dk, dv

    def low_rank(self, x: Tensor, a: Tensor, bs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """Adds B A x to the y (N, out) of each layer, in place; returns h = A x (N, R), for x (N, in).

        a (R, in) is the A of all layers, stacked, and each b (out, r) the B of one, with the update's scale.
        """
        h = x.new_empty(len(x), len(a))
        struct = LowRankStruct(x.data_ptr(), a.data_ptr(), h.data_ptr(), layers=len(bs), rows=len(x))
        struct.inputs, struct.rank = x.size(1), len(a)
        for layer, (b, y) in enumerate(zip(bs, ys, strict=True)):
            struct.b[layer], struct.y[layer] = b.data_ptr(), y.data_ptr()
            struct.outputs[layer], struct.ranks[layer] = b.shape
        self._low_rank(struct, 0, torch.get_num_threads())
        return h

    def low_rank_backward(
        self, dys: Sequence[Tensor], x: Tensor | None, a: Tensor, h: Tensor | None, bs: Sequence[Tensor], wants_dx: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
        """Returns the gradients of x (N, in), of a (R, in), and of each B, as (r, out); the latter two in float32.

        b is (r, out) here. Without x there is no gradient of a, without h none of the Bs.
        """
        threads, rows = torch.get_num_threads(), len(dys[0])
        dx = a.new_empty(rows, a.size(1)) if wants_dx else None
        da = None if x is None else a.new_zeros(threads, *a.shape, dtype=torch.float32)
        dbs = None if h is None else [b.new_zeros(threads, *b.shape, dtype=torch.float32) for b in bs]
        pointers = {name: t.data_ptr() for name, t in {"x": x, "h": h, "dx": dx, "da": da}.items() if t is not None}
        struct = LowRankStruct(a=a.data_ptr(), layers=len(bs), rows=rows, inputs=a.size(1), rank=len(a), **pointers)
        for layer, (b, dy) in enumerate(zip(bs, dys, strict=True)):
            struct.b[layer], struct.dy[layer] = b.data_ptr(), dy.data_ptr()
            struct.ranks[layer], struct.outputs[layer] = b.shape
            if dbs is not None:
                struct.db[layer] = dbs[layer].data_ptr()
        self._low_rank(struct, 1, threads)
        return dx, None if da is None else da.sum(0), None if dbs is None else [db.sum(0) for db in dbs]

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns silu(gate) * up."""
        y = torch.empty_like(gate)
        self._swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), torch.get_num_threads())
        return y

    def swiglu_backward(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of both."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        tensors = (t.data_ptr() for t in (dy, gate, up, dgate, dup))
        self._swiglu_backward(*tensors, dy.numel(), torch.get_num_threads())
        return dgate, dup

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Returns x / rms(x) * weight for x (..., d), and 1 / rms(x) (..., 1) in float32, as the weight (d,)."""
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        sizes = (scale.numel(), x.size(-1), torch.get_num_threads())
        self._norm(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), scale.data_ptr(), *sizes)
        return y, scale

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_dweight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of x, and of the weight if that is needed, in float32."""
        dx, threads = torch.empty_like(x), torch.get_num_threads()
        dweight = weight.new_zeros(threads, len(weight)) if needs_dweight else None
        tensors = [t.data_ptr() for t in (dy, x, weight, scale, dx)]
        tensors.append(None if dweight is None else dweight.data_ptr())
        self._norm_backward(*tensors, scale.numel(), x.size(-1), threads)
        return dx, None if dweight is None else dweight.sum(0)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
        """Returns x (1, heads, T, D) rotated forwards (1) or back (-1); cos and sin are (1, 1, T, R)."""
        _, heads, tokens, size = x.shape
        y = x.new_empty(1, tokens, heads, size)
        tensors = (cos.data_ptr(), sin.data_ptr(), y.data_ptr())
        sizes = (heads, tokens, size, cos.size(-1), direction, torch.get_num_threads())
        self._rotate(x.data_ptr(), x.stride(1), x.stride(2), *tensors, *sizes)
        return y.transpose(1, 2)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns -log p(target) (N,) in float32; writes the gradient over the logits (N, V). Targets are int64."""
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        tensors = (t.data_ptr() for t in (logits, targets, losses))
        self._cross_entropy(*tensors, *logits.shape, torch.get_num_threads())
        return losses


def _attention(tensors: dict[str, Tensor], window: int | None) -> AttentionStruct:
    struct = AttentionStruct(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
    for name in ("q", "k", "v", "dy"):
        if name in tensors:
            setattr(struct, f"{name}_head", tensors[name].stride(0))
            setattr(struct, f"{name}_token", tensors[name].stride(1))
    struct.heads, struct.tokens, struct.size = tensors["q"].shape
    struct.documents, struct.kv_heads = len(tensors["starts"]) - 1, tensors["k"].size(0)
    struct.window = window or ALL
    return struct
