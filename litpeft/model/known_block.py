"""What the fast paths support: a LLaMA block. Whatever is not named here takes the plain path of gpt.py."""

from collections.abc import Collection
from dataclasses import MISSING, fields

import torch.nn as nn
import torch.nn.functional as F

from litpeft.model.config import ModelConfig
from litpeft.model.gpt import MLP, Block
from litpeft.model.multi_head import Attention, Sdpa
from litpeft.model.norms import RMSNorm
from litpeft.model.slots import is_empty

PARTS = {  # the submodules of each
    Block: {"norm1", "attn", "after_attn", "norm2", "mlp", "after_mlp", "after_block"},
    Attention: {"q", "k", "v", "o", "core"},
    MLP: {"gate", "up", "down"},
}
# Switches of the model that do not change a block, or that every fast path reads.
READ = {"norm_eps", "rotary_dim", "rope_theta", "rope_scaling", "learned_positions", "tie_embeddings", "window"}
BIASES = {"qkv_bias", "output_bias", "mlp_bias"}


def at_defaults(config: ModelConfig, but: Collection[str]) -> bool:
    """Returns whether every switch of the model is at its default, except those that a fast path reads."""
    switches = [field for field in fields(config) if field.default is not MISSING and field.name not in but]
    return all(getattr(config, switch.name) == switch.default for switch in switches)


def is_llama(block: nn.Module) -> bool:
    """Returns whether a block consists of exactly these modules, and no method acts outside its linear layers."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not MLP:
        return False
    if any({name for name, _ in part.named_children()} != PARTS[type(part)] for part in (block, block.attn, block.mlp)):
        return False
    norms = all(type(norm) is RMSNorm for norm in (block.norm1, block.norm2))
    empty = all(is_empty(slot) for slot in (block.after_attn, block.after_mlp, block.after_block))
    core = type(block.attn.core) is Sdpa and not block.attn.core.deltas and block.attn.sinks is None
    return norms and empty and core and not block.parallel and block.mlp.act is F.silu
