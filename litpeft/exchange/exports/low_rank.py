"""What a run adds to linear layers as B A x, for the formats that have nothing else."""

from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import some
from litpeft.core.exports import CannotExport
from litpeft.core.terminal import command_line
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.compare import FOLD_TOLERANCE, PROMPTS, ROUND_TOLERANCE, check, in_float32, logits_of
from litpeft.exchange.run import Run, build_run
from litpeft.model.build import build
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta, Linear, LowRankDelta, Slot

Factors = dict[str, tuple[Tensor, Tensor]]  # our name of a linear layer -> A (r, in) and B (out, r), in float32


def factors_of(run: Run, base: Path) -> Factors:
    """Returns what a run learned; raises CannotExport for what is no update of low rank of linear layers."""
    return factors_in(build_run(run, base, run.dtype, storage=run.storage).eval(), run)


@torch.no_grad()
def factors_in(model: GPT, run: Run) -> Factors:
    """Returns `factors_of` a run that `model` holds."""
    if model.base_values:
        raise CannotExport(f"it trained weights of the base, too: {some(sorted(model.base_values))}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.slot.deltas}
    inside = {layer.slot for layer in layers.values()}
    for name, slot in model.named_modules():
        if isinstance(slot, Slot) and slot.deltas and slot not in inside:
            raise CannotExport(f"{name} acts on activations")
    return {name: _factors(name, layer, run) for name, layer in layers.items()}


def _factors(name: str, layer: Linear, run: Run) -> tuple[Tensor, Tensor]:
    affine = layer.slot.frozen(layer)
    if affine is None or affine.A is None or affine.gain is not None or affine.shift is not None:
        raise CannotExport(f"what {name} learned is no update of low rank alone")
    pairs = [(affine.A.float(), affine.B.float())]
    for delta in layer.slot.deltas.values():
        taken = delta.off() if takes_out(delta) else None
        if taken is not None:  # what the delta took out of the weight is in other programs' base
            if run.storage is not None:
                raise CannotExport(
                    f"its base is held in {run.storage.name} with codes that were chosen for what it learned"
                )
            a, b = taken.factors()
            pairs.append((a.float(), -b.float()))
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


def takes_out(delta: Delta) -> bool:
    """Returns whether a delta took something out of the weight beside it, as PiSSA's does."""
    return type(delta).off is not Delta.off


def wanted(run: Run, base: Path, prompts: list[list[int]]) -> tuple[Tensor, torch.dtype]:
    """Returns the logits that an adapter must give beside the base, and the type of the base's weights for them.

    They are the run's, in its type. But a run that took something out of the weights holds the rest rounded, and the
    adapter stands beside the whole weights: these are compared in float32, and how far the run is from that is printed.
    """
    model = in_float32(build_run(run, base, run.dtype, storage=run.storage))
    logits = logits_of(model, prompts)
    deltas = [delta for layer in model.modules() if isinstance(layer, Linear) for delta in layer.slot.deltas.values()]
    del model  # two models may not fit in memory
    if run.storage is not None or not any(map(takes_out, deltas)) or run.dtype not in (torch.bfloat16, torch.float16):
        return logits, run.dtype
    exact = logits_of(in_float32(build_run(run, base, torch.float32)), prompts)
    name = f"the run, its weights in {str(run.dtype).removeprefix('torch.')}"
    hint = f"`{command_line('merge', run.place)}` writes the weights as the run holds them"
    check(exact, logits, ROUND_TOLERANCE[run.dtype], name, run.place, hint)
    return exact, torch.float32


class Fixed(LowRankDelta):
    """B A x, as it was read."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.pair = a, b

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.pair


def check_factors(factors: Factors, run: Run, base: Path, where: Path) -> str:
    """Compares the logits of base and factors, as they were read back, with the run's; returns a line to print."""
    prompts = [Tokenizer.load(base).encode(text) for text in PROMPTS]
    want, dtype = wanted(run, base, prompts)
    plain = in_float32(build(base, dtype, storage=run.storage))
    before = logits_of(plain, prompts)
    attach(plain, factors)
    check(want, logits_of(plain, prompts), FOLD_TOLERANCE, "adapter read back, on its base", where)
    return f"  {'the base without it':<32} differs by {float((before - want).abs().max()):.2e}"


def attach(model: GPT, factors: Factors) -> None:
    """Lets a model add what was read to its linear layers."""
    for name, pair in factors.items():
        model.get_submodule(name).slot.add("read", Fixed(*pair))
