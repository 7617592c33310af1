"""The command `combine`: the changes of weights that runs have learned, weighted and summed, as one run of LoRA.

    D = sum_i w_i (W_i - W)        B A = the largest singular parts of D        W_i: what run i folds into, W: its base

The factors of runs are not summed: (B1 + B2) (A1 + A2) is another matrix than B1 A1 + B2 A2.
"""

from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.folders import atomic_folder, locked, refuse_existing
from litpeft.core.place import check_place
from litpeft.core.terminal import command_line, say
from litpeft.exchange.imports.peft import PeftRun
from litpeft.exchange.run import Run, build_run, find_run, save_result, tell_progress
from litpeft.exchange.settings import Combine
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.fold import unfoldable
from litpeft.model.gpt import GPT
from litpeft.model.singular import largest
from litpeft.model.slots import Linear


def combine(settings: Combine) -> None:
    """Writes the run, and says how much of the changes it holds."""
    out = Path(settings.out)
    check_place(out)
    refuse_existing(out, settings.overwrite)
    weights = {settings.run: settings.weight, **settings.also}
    runs = {place: usable(Path(place)) for place in weights}
    first = runs[settings.run]
    for place, run in runs.items():
        if out.resolve() in (run.folder.resolve(), *run.folder.resolve().parents):
            raise ConfigError(f"the result would replace {place}, from which it is made", where="out")
        mine, theirs = (
            {**r.facts["base"], "template": r.facts["template"], "precision": r.dtype} for r in (run, first)
        )
        other = [key for key in mine if key != "path" and mine[key] != theirs[key]]
        if other:
            what = f"its base is not that of {settings.run} (another {other[0]}): their changes cannot be summed"
            raise ModelError(what, where=place)
    base = first.base_folder(settings.base)
    plain = build(base, torch.float32, storage=first.storage)
    models = [(weights[place], foldable(run, base, place)) for place, run in runs.items()]
    changes, kept, total = {}, 0.0, 0.0
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if not isinstance(layer, Linear):
                continue
            change = sum(weight * changed(model, name, layer) for weight, model in models)
            if change.any():
                a, b = largest(change, settings.rank)
                lost, size = float((change - b @ a).square().sum()), float(change.square().sum())
                changes[name], kept, total = (a, b, 1 - lost / size), kept + size - lost, total + size
    if not changes:
        raise ModelError("the changes come to nothing: there is nothing to write", where=settings.run)
    method = LoRA(rank=settings.rank, alpha=float(settings.rank), targets=tuple(changes))
    result = build(base, torch.float32, method, storage=first.storage)
    for name, (a, b, _) in changes.items():
        delta = result.get_submodule(name).slot.lora
        for own, factor in ((delta.A, a), (delta.B.T, b.T)):
            own.data.zero_()[: len(factor)] = factor
    facts = {key: first.facts[key] for key in ("base", "template", "precision", "step", "steps_done", "steps_planned")}
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        save_result(folder / "final", result, "lora", method, base, facts | {"finished": True})
    least = min(changes, key=lambda name: changes[name][2])
    say(f"rank {settings.rank} of {len(changes)} layers keeps {kept / total:.2%} of the energy of the changes")
    say(f"least in {least}: {changes[least][2]:.2%}")
    say(f"a run of LoRA in {out}; next: {command_line('chat', out)}")


def usable(place: Path) -> Run:
    """Returns the run at a place; raises if it holds no delta."""
    run = find_run(place)
    if run is None or run.is_model:
        what = "this is a model, not a run with a delta beside its base" if run else "this is no run but a model folder"
        raise ModelError(what, where=place, hint="name runs of methods that `litpeft merge` folds")
    if isinstance(run, PeftRun):
        hint = f"`{command_line('merge', place)}` makes a model of it"
        raise ModelError("this is an adapter of peft, which does not record its base's weights", where=place, hint=hint)
    if run.facts["settings"].get("add_tokens"):
        raise ModelError("it adds tokens to its base's vocabulary, which LoRA does not", where=place)
    tell_progress(run)
    return run


def foldable(run: Run, base: Path, place: str) -> GPT:
    """Returns the run's model; raises if it does more than change weights of linear layers."""
    model = build_run(run, base, torch.float32, storage=run.storage)
    if unfoldable(model):
        raise ModelError(f"{unfoldable(model)} acts on activations, and is no change of weights", where=place)
    layers = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Linear)}
    rest = sorted(model.base_values.keys() - layers)
    if rest:
        raise ModelError(f"it trained {rest[0]}, which an update of a linear layer cannot change", where=place)
    return model


def changed(model: GPT, name: str, plain: Linear) -> Tensor:
    """Returns what a run adds to the weight of a layer (out, in), in float64."""
    layer = model.get_submodule(name)
    weight, bias = layer.dense().double(), None if layer.bias is None else layer.bias.double()
    if layer.slot.deltas:
        folded, shifted = layer.slot.frozen(layer).fold(weight, bias)
        if shifted is not None and (bias is None or not torch.equal(shifted, bias)):
            raise ModelError(f"it changes the bias of {name}, which LoRA does not", where="run")
        weight = folded
    return weight - plain.dense().double()
