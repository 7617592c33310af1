"""Compares what a merged model computes with what the run computes, by the logits of a few prompts."""

from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.terminal import say
from litpeft.model.context import Context
from litpeft.model.delta import without_delta
from litpeft.model.gpt import GPT
from litpeft.model.kernels.ops import product
from litpeft.model.slots import Delta, Linear, Slot

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "Translate to German: Good morning, how are you?",
)
# The largest difference of a logit that is allowed, relative to the largest logit.
FOLD_TOLERANCE = 5e-5
ROUND_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def in_float32(model: GPT) -> GPT:
    """Lets `model` compute in float32 and drop the pages of its weights after each block."""
    model.dtype, files = torch.float32, model.files
    for block in model.blocks:
        block.register_forward_hook(lambda *_: files.drop_pages())
    return model.eval()


class Scratch:
    """Copies tensors to float32 or float64 in one buffer, since allocating a new one each time is slower."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, tensor: Tensor) -> Tensor:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if self.memory.numel() < tensor.numel() or self.memory.dtype != dtype:
            self.memory = torch.empty(tensor.numel(), dtype=dtype)
        return self.memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


class _ThreeWays(Delta):
    """Computes a layer three ways, for tokens that come three times: with deltas, without, and with them folded."""

    def __init__(self, slot: Slot, widened: Scratch):
        super().__init__()
        self.slot, self.widened = Slot(), widened
        self.slot.deltas = slot.deltas

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context | None) -> Tensor:
        (with_deltas, without, _), (first, _, third) = y.chunk(3, 1), x.chunk(3, 1)
        return torch.cat((self.slot(with_deltas, first, linear, ctx), without, self.folded(third, linear)), 1)

    def folded(self, x: Tensor, linear: Linear) -> Tensor:
        """Returns the output for x of a layer into which the deltas are folded."""
        bias = None if linear.bias is None else linear.bias.to(x.dtype, copy=True)
        return product(x, *self.slot.frozen(linear).fold(self.widened(linear.dense()), bias))


class _Folded(_ThreeWays):
    """Computes a layer with its deltas folded."""

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context | None) -> Tensor:
        return self.folded(x, linear)


def three_ways(model: GPT, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of base + delta, of the base, and of the folded weights. The model cannot be used afterwards.

    The three are computed in one forward pass, so that every weight is read once; but in three by a mixture of experts,
    each of which sees some of the tokens.
    """
    tokens, widened, apart = sum(map(len, prompts)), Scratch(), model.config.experts is not None
    if apart:
        want = logits_of(model, prompts)
        with without_delta(model):
            before = logits_of(model, prompts)
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.slot.deltas:
            layer.slot.deltas = {"three ways": (_Folded if apart else _ThreeWays)(layer.slot, widened)}
    if apart:
        return want, before, logits_of(model, prompts)
    want, before, fold = logits_of(model, 3 * prompts).split(tokens)
    if model.base_values:
        with without_delta(model):
            before = logits_of(model, 3 * prompts)[tokens : 2 * tokens]
    return want, before, fold


@torch.inference_mode()
def logits_of(model: GPT, prompts: list[list[int]]) -> Tensor:
    ids = torch.tensor([[i for prompt in prompts for i in prompt]])
    return model(ids, Context.packed(tuple(map(len, prompts)), ids.device, None))[0]


def check(want: Tensor, got: Tensor, limit: float, name: str, where: Path | str, hint: str = "") -> None:
    """Prints how far logits are from those of the model; raises if that is more than `limit` times the largest."""
    off, size = float((got - want).abs().max()), float(want.abs().max())
    same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    say(f"  {name:<32} differs by {off:.2e}, same next token at {same:.0%}; allowed: {limit * size:.1e}")
    if not off <= limit * size:
        what = f"logits of the {name} are off by {off / size:.1e} of the largest, more than {limit:.0e}"
        raise ModelError(f"{what}: nothing was written", where=where, hint=hint)
