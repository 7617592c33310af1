"""Linear attention in a GGUF file: other names, and value heads in another order.

    ours    A_log                  conv (F, 1, W)       values of each key head together: k0v0 k0v1 k1v0 k1v1
    theirs  ssm_a = -exp(A_log)    ssm_conv1d (F, W)    Qwen3.5: the first of each, then the second: k0v0 k1v0 k0v1 k1v1

The order is that of all that has a row or a column for each value. Qwen3-Next's files keep ours. In those of Mamba-2
ssm_a and ssm_d are (H, 1), and ssm_norm is (G, values of a group).
"""

import torch
from torch import Tensor

from litpeft.model.families import split_name
from litpeft.model.parts import LinearAttention, StateSpace

# llama.cpp's names, where those of the `gguf` package are of other tensors, or of Qwen3-Next's older files
QKV = dict.fromkeys(("in_q.weight", "in_k.weight", "in_v.weight"), "attn_qkv.weight")
NAMES = QKV | {"in_z.weight": "attn_gate.weight", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}
MAMBA = {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias", "D": "ssm_d"}
OF_HEADS = ("ssm_a", "ssm_d")  # with a row for each of Mamba's heads
DECAY, OUT = "ssm_a", "ssm_out.weight"
CONVS = ("ssm_conv1d.weight", "shortconv.conv.weight")  # with a row for each channel
BY_VALUE = ("in_v.weight", "in_z.weight", "in_b.weight", "in_a.weight", "A_log", "dt_bias")


def own_name(ours: str, mamba: bool) -> str | None:
    """Returns the tensor of a parameter of linear attention, or of Mamba's; None if the `gguf` package knows it."""
    block, _, leaf = ours.partition(".attn.")
    names = MAMBA if mamba else NAMES
    return f"blk.{split_name(ours)[1][0]}.{names[leaf]}" if block.startswith("blocks.") and leaf in names else None


def shape_of(name: str, sizes: StateSpace) -> tuple[int, int] | None:
    """Returns the shape of a tensor of Mamba's that is a vector here; None for the others."""
    if name.endswith(OF_HEADS):
        return sizes.heads, 1
    return (sizes.groups, sizes.inner // sizes.groups) if name.endswith("ssm_norm.weight") else None


def computed(name: str, values: Tensor, sizes: LinearAttention | None) -> Tensor:
    """Returns what a tensor of the file holds for our numbers; `sizes` if its value heads are in turn."""
    if name.endswith(DECAY):
        return -values.float().exp()
    return in_turn(values.mT, sizes).mT if sizes is not None and name.endswith(OUT) else values


def restored(name: str, values: Tensor, sizes: LinearAttention | None) -> Tensor:
    """Returns our numbers for those that a tensor of the file holds."""
    if name.endswith(DECAY):
        return torch.log(-values)
    return by_key_head(values.mT, sizes).mT if sizes is not None and name.endswith(OUT) else values


def rows_in_turn(ours: str, rows: Tensor, sizes: LinearAttention, back: bool = False) -> Tensor:
    """Returns the rows of one of our parameters in the file's order, or those of the file in ours."""
    leaf, order = ours.partition(".attn.")[2], by_key_head if back else in_turn
    if leaf == "conv.weight":
        keys = 2 * sizes.key_heads * sizes.key_size
        return torch.cat((rows[:keys], order(rows[keys:], sizes)))
    return order(rows, sizes) if leaf in BY_VALUE else rows


def in_turn(rows: Tensor, sizes: LinearAttention) -> Tensor:
    """Returns rows (heads * n, ...) with the first value head of each key head, then the second of each."""
    return rows.unflatten(0, (sizes.key_heads, sizes.heads // sizes.key_heads, -1)).transpose(0, 1).flatten(0, 2)


def by_key_head(rows: Tensor, sizes: LinearAttention) -> Tensor:
    """Returns rows (heads * n, ...) that are in turn with all value heads of the first key head, then of the second."""
    return rows.unflatten(0, (sizes.heads // sizes.key_heads, sizes.key_heads, -1)).transpose(0, 1).flatten(0, 2)
