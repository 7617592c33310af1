"""Cross-entropy straight from hidden states, so that the logits of all positions are never held."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits exist at one time


def summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum over N positions of -log p(target), in float32 or better; x is (N, d), targets (N,)."""
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for start in range(0, max(1, len(targets)), CHUNK):  # no targets: a zero that still has its gradient, of zeros
        part = x[start : start + CHUNK], targets[start : start + CHUNK]
        if torch.is_grad_enabled():
            total = total + checkpoint(_summed, head, *part, use_reentrant=False)
        else:
            total = total + _summed(head, *part)
    return total


def _summed(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    logits = head(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
