"""A second embedding, with a vector for each layer, and how a layer reads it.

    e = (norm(W x / sqrt(d)) + E[token] * sqrt(p)) / sqrt(2)     of all layers at once, x the embedded text
    y + norm(V (act(G y) * e_l))                                  in layer l, after its MLP

Letters: B rows, T new tokens, L layers, d model width, p size of a layer's vector. E (tokens, L p), W (L p, d),
G (p, d), V (d, p).
"""

from collections.abc import Callable

import torch.nn as nn
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.norms import make_norm
from litpeft.model.slots import Embedding, Linear


class LayerTable(nn.Module):
    """The vectors e of all layers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers, self.size, self.scale = config.n_layers, config.layer_inputs.size, config.d_model**-0.5
        self.embed = Embedding(config.layer_inputs.vocab_size, self.layers * self.size)
        self.project = Linear(config.d_model, self.layers * self.size)
        self.norm = make_norm(config, self.size)

    def forward(self, ids: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """Returns (B, T, L, p) for tokens (B, T) and their embeddings x (B, T, d)."""
        of_tokens = self.embed(ids).to(x.dtype) * x.new_full((), self.size**0.5)  # rounded as in the model's training
        of_text = self.project(x, ctx) * self.scale
        shape = (*x.shape[:-1], self.layers, self.size)
        return (self.norm(of_text.view(shape)) + of_tokens.view(shape)) * 2**-0.5


class LayerInput(nn.Module):
    """What a layer adds, by its vector."""

    def __init__(self, config: ModelConfig, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.act = act
        self.gate = Linear(config.d_model, config.layer_inputs.size)
        self.out = Linear(config.layer_inputs.size, config.d_model)
        self.norm = make_norm(config)

    def forward(self, y: Tensor, ctx: Context) -> Tensor:
        return self.norm(self.out(self.act(self.gate(y, ctx)) * ctx.layer_input, ctx))
