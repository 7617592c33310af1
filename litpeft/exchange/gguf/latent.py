"""Latent attention in a GGUF file: the matrix of keys and values is two tensors there, with a part for each head.

    ours    kv_b (H * (still + values), rank)
    theirs  attn_k_b (H, rank, still), which is multiplied to queries; attn_v_b (H, values, rank)

Letters: H heads.
"""

from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.families import split_name

NAMES = ("attn_k_b", "attn_v_b")


def split_names(ours: str) -> tuple[str, ...]:
    """Returns the two tensors that hold a parameter; none for others."""
    module, numbers, leaf = split_name(ours)
    return tuple(f"blk.{numbers[0]}.{name}.{leaf}" for name in NAMES) if module == "blocks.{}.attn.kv_b" else ()


def split_shapes(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of both."""
    sizes, heads = config.latent, config.n_heads
    return (heads, sizes.kv_rank, sizes.still), (heads, sizes.values, sizes.kv_rank)


def split(config: ModelConfig, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both tensors for kv_b."""
    sizes = config.latent
    keys, others = values.unflatten(0, (config.n_heads, -1)).split((sizes.still, sizes.values), 1)
    return keys.transpose(1, 2), others


def joined(keys: Tensor, values: Tensor) -> Tensor:
    """Returns kv_b for both tensors."""
    both = keys.new_empty(len(keys), keys.size(2) + values.size(1), keys.size(1))
    both[:, : keys.size(2)], both[:, keys.size(2) :] = keys.transpose(1, 2), values
    return both.flatten(0, 1)
