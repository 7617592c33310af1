"""Several runs beside one base: each row of a call has the deltas of one of them, or none.

    y[row] <- gain[n] * y[row] + B[n] A[n] x[row] + shift[n]        n = ctx.adapter[row], 0 for the base

The base's products, which take most of the time, are computed for all rows together. S-LoRA https://arxiv.org/abs/2311.03285
does so for LoRA; here every method does of which each Delta is an affine map in a linear layer of a block.

Letters: B rows, T tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.affine import Affine
from litpeft.model.build import deltas_alone
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.delta import Method, load_delta
from litpeft.model.gpt import GPT
from litpeft.model.kernels.low_rank import apply_affines
from litpeft.model.mixture import Mixture
from litpeft.model.quantize import Storage
from litpeft.model.slots import Delta, Linear, Slot

NAME = "runs"  # of the Delta in its slot
TERMS = {"gain": 1.0, "A": 0.0, "B": 0.0, "shift": 0.0}  # of Affine, and the numbers with which they do nothing


class ByRow(Delta):
    """What each of several runs does in one linear layer."""

    claims = "all rows"

    def __init__(self, places: int, like: Tensor):
        """Maps of so many runs find a place; they are held as `like`, a tensor of a type on a device."""
        super().__init__()
        self.maps = [Affine()] * (1 + places)  # of the base, and of runs 1, 2, ...
        self.like = like

    def put(self, number: int, one: Affine) -> bool:
        """Holds the map of a run, in the place of what was there; returns whether other maps moved in memory."""
        terms = {key: getattr(one, key) for key in TERMS}
        self.maps[number] = Affine(**{key: None if term is None else term.to(self.like) for key, term in terms.items()})
        return False

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context) -> Tensor:
        """y is (B, T, out), x (B, T, in)."""
        if ctx.adapter is None:
            return y
        z, own = y.clone(), ctx.adapter.tolist()
        for number in {*own} - {0}:
            rows = [row for row, adapter in enumerate(own) if adapter == number]
            z[rows] = apply_affines([y[rows]], x[rows], [self.maps[number]])[0]
        return z


class Stacked(ByRow):
    """The same with the maps of all runs in one tensor, so that a GPU can repeat a step for other rows."""

    def __init__(self, places: int, like: Tensor):
        super().__init__(places, like)
        for key in TERMS:
            self.register_buffer(key, None, persistent=False)  # as in Affine, with N places before

    def put(self, number: int, one: Affine) -> bool:
        moved = False
        for key, nothing in TERMS.items():
            term, held = getattr(one, key), getattr(self, key)
            if held is not None:
                held[number] = nothing
            if term is None:
                continue
            shape = (len(self.maps), *term.shape)
            if held is None or held.shape < shape:  # only the rank differs
                setattr(self, key, self.like.new_full(shape, nothing))
                if held is not None:
                    getattr(self, key)[tuple(map(slice, held.shape))] = held
                moved = True
            getattr(self, key)[number][tuple(map(slice, term.shape))] = term
        return moved

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context) -> Tensor:
        """y is (B, T, out), x (B, T, in)."""
        if ctx.adapter is None:
            return y
        z, own = y.to(self.like.dtype), ctx.adapter
        if self.gain is not None:
            z = z * self.gain[own][:, None]
        if self.A is not None:
            z = torch.baddbmm(z, x.to(self.like.dtype) @ self.A[own].mT, self.B[own].mT)
        if self.shift is not None:
            z = z + self.shift[own][:, None]
        return z.to(y.dtype)


def add_by_row(model: GPT, runs: Sequence[Mapping[str, Affine]], spare: int = 0) -> None:
    """Lets the rows of a model without deltas have those of `runs`, which `affine_maps` gave: 1 for the first run.

    After them are `spare` places for others, which `put_run` fills.
    """
    weight = model.embed.weight
    kind = Stacked if weight.is_cuda else ByRow
    wide = model.dtype if weight.is_cuda else torch.promote_types(model.dtype, torch.float32)
    like = torch.empty(0, dtype=wide, device=weight.device)
    known = knowing_rows(model)
    named = (name for name, layer in model.named_modules() if isinstance(layer, Linear) and layer in known)
    for name in list(named) if spare else sorted({name for maps in runs for name in maps}):
        delta = kind(len(runs) + spare, like)
        model.get_submodule(name).slot.add(NAME, delta.eval().requires_grad_(False))
    for number, maps in enumerate(runs, 1):
        put_run(model, number, maps)


@torch.no_grad()
def put_run(model: GPT, number: int, maps: Mapping[str, Affine]) -> bool:
    """Puts a run in one of the places of `add_by_row`; returns whether others moved in memory."""
    slots = {name: layer.slot.deltas for name, layer in model.named_modules() if isinstance(layer, Linear)}
    moved = [held[NAME].put(number, maps.get(name, Affine())) for name, held in slots.items() if NAME in held]
    return any(moved)


def deltas_beside(config: ModelConfig, method: Method, storage: Storage | None, delta: dict[str, Tensor]) -> GPT | None:
    """Returns a model with nothing but a run's deltas; None if they act elsewhere than in layers that know their row.

    `storage` is how its base is held, `delta` what the run saved.
    """
    if method.add_tokens or method.unfreeze or method.defines("choose"):
        return None
    alone = deltas_alone(config, method, storage, delta)
    if any(name in alone.base_keys for name in delta):
        return None
    slots = {name: module for name, module in alone.named_modules() if isinstance(module, Slot) and module.deltas}
    known = knowing_rows(alone)
    layers = [alone.get_submodule(name.rpartition(".")[0]) for name in slots]
    return alone if all(isinstance(layer, Linear) and layer in known for layer in layers) else None


@torch.no_grad()
def affine_maps(model: GPT, alone: GPT, method: Method, delta: dict[str, Tensor]) -> dict[str, Affine] | None:
    """Returns what a run does to the output of its base's linear layers, by their names; None if it does more.

    `model` is the base, without deltas; `alone` holds those of the run, as `deltas_beside` gave them.
    """
    layers = {
        name: layer.slot for name, layer in alone.named_modules() if isinstance(layer, Linear) and layer.slot.deltas
    }
    for part in (*layers.values(), alone.banks):
        part.to(model.embed.weight.device)
    if method.defines("start"):
        for name in layers:
            weight = model.get_submodule(name).dense()
            if method.start(name, alone.get_submodule(name), weight, lambda own: own, delta) is not weight:
                return None  # the run's base has other weights
        load_delta(alone, delta, "delta")  # over what `start` has written
    maps = {name: slot.frozen(model.get_submodule(name)) for name, slot in layers.items()}
    return None if None in maps.values() else maps


def knowing_rows(model: GPT) -> set[nn.Module]:
    """Returns the layers that are told which rows a call has: neither the head is, nor an expert."""
    experts = {layer for part in model.modules() if isinstance(part, Mixture) for layer in part.experts.modules()}
    return {layer for block in model.blocks for layer in block.modules()} - experts


def runs_of(layers: Sequence[Linear]) -> int:
    """Returns how many runs layers that read the same x have by row; 0 if none or other deltas are in them."""
    deltas = [layer.slot.deltas for layer in layers]
    held = next((one[NAME] for one in deltas if NAME in one), None)
    return 0 if held is None or any(one.keys() - {NAME} for one in deltas) else len(held.maps) - 1


def maps_of(layers: Sequence[Linear], run: int) -> Affine:
    """Returns what a run does to the outputs of layers that read the same x, one after the other."""
    deltas, sizes = [layer.slot.deltas for layer in layers], [layer.out_features for layer in layers]
    return Affine.concatenate([one[NAME].maps[run] if NAME in one else Affine() for one in deltas], sizes)
