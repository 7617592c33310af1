"""Decoding steps as CUDA graphs: the thousand kernels of a step are recorded once, and then launched as one.

Launching them one by one takes a processor several times as long as the GPU needs to run them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from litpeft.model.context import Context, KVCache
from litpeft.model.gpt import GPT

WIDTHS = (1, 16)  # new tokens of a row that steps are recorded for; 16 with guessed ones


class RecordedStep:
    """A step of a model over T new tokens of each of B rows, whose earlier ones are in `layers`.

    Valid for these layers only, and while no weight and no key moves in memory. Attention reads all keys of the cache,
    masked.
    """

    def __init__(self, model: GPT, layers: list[KVCache], shape: tuple[int, int]):
        device = model.embed.weight.device
        self.ids, self.pos = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.prompts = torch.zeros(shape[0], 1, dtype=torch.int64, device=device)
        self.adapter = torch.zeros(shape[0], dtype=torch.int64, device=device)
        end = min(layers[0].k.size(2), model.max_positions)
        self.logits: Tensor | None = None

        def step() -> None:
            self.logits = model(self.ids, Context(self.pos, None, self.prompts, self.adapter, layers, end))

        self.replay = record(step)

    def __call__(self, ids: Tensor, pos: Tensor, prompts: Tensor | None, adapter: Tensor | None) -> Tensor:
        """Returns the logits (B, T, V) after each token of ids (B, T); the next call writes over them."""
        self.ids.copy_(ids)
        self.pos.copy_(pos)
        if prompts is not None:
            self.prompts.copy_(prompts)
        if adapter is not None:
            self.adapter.copy_(adapter)
        self.replay()
        return self.logits


def record(step: Callable[[], None], pool: tuple[int, int] | None = None) -> Callable[[], None]:
    """Returns a function that repeats `step` on the GPU, with the same tensors. Run `step` once before this.

    What a kernel loads at its first use cannot be recorded. Graphs with the same `pool` share memory.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay
