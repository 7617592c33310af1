"""The weights of a model before it has learned anything, as transformers' classes begin with them.

Matrices and convolutions are normal numbers of mean 0, whose deviation is config.json's `initializer_range`; biases are
0, and norms multiply by 1. transformers' Nemotron begins with norms that multiply by 2, which is not done here: NeMo,
which trained these models, begins with 1.
"""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.config import checked
from litpeft.model.families import family
from litpeft.model.families.names import NameMap
from litpeft.model.gpt import GPT
from litpeft.model.mixture import Router
from litpeft.model.norms import GatedNorm, LayerNorm, LayerNorm1p, RMSNorm, RMSNorm1p
from litpeft.model.short_convolution import Convolution
from litpeft.model.state_space import Mamba2

DRAWN = nn.Linear | nn.Embedding | Convolution
DECAY = 16.0  # largest rate at which a head of linear attention forgets
STEEPNESS = 0.8  # of xIELU's parabola, and how much steeper its exponential may be than BETA
BETA = 0.5
CONSTANTS = {
    "bias": 0.0,
    "e_score_correction_bias": 0.0,
    "expert_bias": 0.0,
    "D": 1.0,
    "dt_bias": 1.0,
    "layer_scalar": 1.0,
    "alpha_p": math.log(math.expm1(STEEPNESS)),
    "alpha_n": math.log(math.expm1(STEEPNESS - BETA)),
    "beta": BETA,
    "eps": -1e-6,
}


def initial_weights(names: NameMap, hf: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of a model by our names, in float32; `hf` is its config.json."""
    module = family(names.family)
    deviation = checked("initializer_range", hf.get("initializer_range", getattr(module, "DEVIATION", 0.02)), float)
    with torch.device("meta"):
        model = GPT(names.config)
    draws = torch.Generator().manual_seed(seed)
    own = getattr(module, "INITIAL", {})
    for ours, shape in names.ours.items():
        draw = next((draw for glob, draw in own.items() if fnmatchcase(ours, glob)), None)
        if draw is None:
            owner, _, leaf = ours.rpartition(".")
            yield ours, _initial(model.get_submodule(owner), leaf, shape, deviation, draws)
        else:
            yield ours, draw(shape, hf, draws)


def _initial(owner: nn.Module, leaf: str, shape: tuple[int, ...], deviation: float, draws: torch.Generator) -> Tensor:
    """Returns the tensor called `leaf` of a module."""
    of_router = isinstance(owner, Router) and leaf == "bias"
    if (isinstance(owner, DRAWN) and leaf == "weight") or of_router or leaf == "sinks":
        return torch.randn(shape, generator=draws) * deviation
    if leaf == "A_log" and isinstance(owner, Mamba2):
        return torch.arange(1.0, shape[0] + 1).log()
    if leaf == "A_log":  # the rates are equally likely
        return torch.rand(shape, generator=draws).mul(DECAY).clamp(min=torch.finfo(torch.float32).tiny).log()
    if leaf == "weight" and isinstance(owner, RMSNorm | LayerNorm | GatedNorm):
        return torch.full(shape, 0.0 if isinstance(owner, RMSNorm1p | LayerNorm1p) else 1.0)
    return torch.full(shape, CONSTANTS[leaf])
