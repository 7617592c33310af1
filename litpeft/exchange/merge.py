"""The command `merge`: folds a run's delta into its base and checks that the files compute what the run computes.

Layer by layer in float32; the base's weights stay memory-mapped in their own dtype.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.folders import COMPANIONS, atomic_folder, locked, refuse_existing, sync_files
from litpeft.core.json import read_json
from litpeft.core.place import check_place
from litpeft.core.safetensors import DTYPES, RESULT_DTYPES, Weights, check_room, copy_companions, write_safetensors
from litpeft.core.terminal import command_line, say
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer, write_added_tokens
from litpeft.exchange.chat_template import write_template
from litpeft.exchange.compare import (
    FOLD_TOLERANCE,
    PROMPTS,
    ROUND_TOLERANCE,
    Scratch,
    check,
    in_float32,
    logits_of,
    three_ways,
)
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.gguf.files import MODEL, OF_DTYPE, GgufFolder
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.gguf.write import held_in_groups, q4_1
from litpeft.exchange.held_out import HeldOut, Unknown
from litpeft.exchange.push import check_repo, push, write_card
from litpeft.exchange.rounding import Rounding
from litpeft.exchange.run import Run, build_run, find_run, tell_progress, write_config
from litpeft.exchange.settings import Merge
from litpeft.model.added_tokens import describe, note_tokens
from litpeft.model.build import build
from litpeft.model.delta import Method
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.fold import folds
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.slots import Linear

NEXT = "llama.cpp, LM Studio, or ollama create NAME -f Modelfile in that folder"
NOT_CHECKED = "not checked, as --no_verify wants it:"


@dataclass
class Result:
    """The files that were written: how they are called, how far their logits may be off, and what they compute."""

    name: str
    limit: float
    logits: Callable[[list[list[int]]], Tensor]
    exact: str = "--dtype float32"  # the option that writes the weights without rounding

    @property
    def rounds(self) -> bool:
        return self.limit > ROUND_TOLERANCE[torch.float32]


def merge(settings: Merge) -> None:
    """Writes the merged model, if it is equal to the run up to rounding."""
    run = find_run(Path(settings.run))
    if run is None:
        what = "this is no run but a model folder (it has no final/delta.json): there is nothing to merge"
        raise ModelError(what, where=settings.run, hint="name the run: the `--out` of `litpeft finetune`")
    if run.is_model:
        what = f"there is nothing to merge: {run.folder} is an ordinary Hugging Face folder already"
        raise ModelError(what, where=settings.run)
    if settings.onto == "original" and run.storage is None:
        what = "the run's base was not quantised (base.quantize null), so there is nothing to choose"
        raise ConfigError(what, where="onto", hint="leave it out")
    if settings.type is not None and settings.to != "gguf":
        raise ConfigError(f"{settings.type} is a type of GGUF files", where="type", hint="say --to gguf, or --dtype")
    check_repo(settings.push)
    out = Path(settings.out) if settings.out else Path(settings.run) / "merged"
    check_place(out)
    refuse_existing(out, settings.overwrite)
    tell_progress(run)
    base = run.base_folder(settings.base)
    tokenizer, template = run.tokenizer_and_template(base)
    for kept in (base, run.folder):
        if kept.resolve().is_relative_to(out.resolve()):
            what = f"the merged model would replace {kept}, from which it is made"
            raise ConfigError(what, where="out", hint="name another folder")
    storage = run.storage if settings.onto == "trained" else None
    dtype = RESULT_DTYPES.get(settings.dtype) or main_dtype(base)
    method = run.method()
    note_tokens(method, tokenizer)
    names = _names(method, base)
    layout = Layout(names) if settings.to == "gguf" else None  # which refuses some before the model is built
    if layout is None:
        check_room(out, names.shapes.values(), dtype)
    model, rounding = _trained(run, base, storage), Rounding()
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        try:
            if layout is None:
                tensors = _merged(model, names, dtype, rounding, settings.run)
                write_safetensors(folder, tensors, int(settings.shard_size * 1e9))
                read = cache(lambda: in_float32(build(folder, dtype)))
                name = str(dtype).removeprefix("torch.")
                result = Result(name, ROUND_TOLERANCE[dtype], lambda prompts: logits_of(read(), prompts))
            else:
                files = GgufFolder(
                    folder, layout, settings.type or OF_DTYPE[dtype], tokenizer, template, run.system, settings.run,
                    in_groups=_in_groups(model),
                )  # fmt: skip
                files.write(_coded(model, files, rounding))
                result = Result(files.type, files.tolerance, files.logits, "--type f32")
        except TypeError as error:
            hint = "generate and chat take the run as it is"
            raise ModelError(f"this run cannot be merged: {error}", where=settings.run, hint=hint) from None
        if layout is None:
            copy_companions(base, folder)
            copy_companions(run.texts(base), folder, COMPANIONS[2:])
            write_config(folder, dtype, method)
            write_added_tokens(folder, tokenizer)
            write_template(folder, template)
            write_stop_ids(folder, template.stop_ids)
        if settings.push:
            write_card(folder, settings.push, base, run, "A finetune")
        if rounding.changed == 0:
            hint = f"train longer, or write {result.exact}"
            raise ModelError("no weight changed: the merged model would be the base", where=settings.run, hint=hint)
        cost: list[str] = []
        held = None
        if settings.no_verify:
            said = "the logits of the files, and of the folded weights, against those of base + delta"
            say(f"{NOT_CHECKED} {said}, and the loss on held-out rows")
        else:
            prompts = [tokenizer.encode(text) for text in PROMPTS]
            other = [run, base] if storage != run.storage else None
            held = _held_out(run, tokenizer, template, names, model.reach) if result.rounds else None
            answers = out if layout is None else None
            cost = _compare(model, result, prompts, folder, settings.run, other, held, answers)
        say(f"weights changed: {rounding.changed:,} of {rounding.total:,}")
        say("\n".join([*rounding.lines(result.name, result.exact, isinstance(held, HeldOut)), *cost]))
    if settings.push:
        push(out, settings.push)
    if layout is None:
        say(f"merged model in {out}; next: {command_line('chat', out)}")
    else:
        say(f"merged model in {out / MODEL}; next: {NEXT}")


def _compare(
    model: GPT,
    result: Result,
    prompts: list[list[int]],
    folder: Path,
    where: str,
    other: list[Any] | None,
    held: HeldOut | str | None,
    out: Path | None,
) -> list[str]:
    """Prints how far the folded weights and the files are from base + delta; raises if that is too far.

    Returns lines on the loss of held-out rows before and after rounding, or on why it is not known.
    """
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(sync_files, folder)  # flush to disk while the models are compared
        loss = held.loss(partial(logits_of, model)) if isinstance(held, HeldOut) else 0.0
        want, before, fold = three_ways(model, prompts)
        del model  # two models may not fit in memory
        written.result()
        files = result.logits(prompts)
    say(
        f"logits at {len(want)} positions of {len(PROMPTS)} prompts, "
        f"compared with base + delta (largest {float(want.abs().max()):.1f}):"
    )
    say(f"  {'the base without the delta':<32} differs by {float((before - want).abs().max()):.2e}")
    if other is not None:
        _tell_of_original(*other, prompts, want)
    hint = f"try {result.exact}"
    check(want, fold, FOLD_TOLERANCE, "folded in float32", where, hint)
    check(want, files, result.limit, f"files read back, {result.name}", where, hint)
    if isinstance(held, HeldOut):
        return held.lines(loss, held.loss(result.logits), result.name, result.exact, out)
    return [] if held is None else [f"what rounding costs in loss is not known: {held}"]


def _held_out(run: Run, tokenizer: Tokenizer, template: ChatTemplate, names: NameMap, reach: int) -> HeldOut | str:
    """Returns the run's held-out rows, or why there are none to measure on."""
    try:
        return HeldOut.of(run, tokenizer, template, reach, sum(map(prod, names.ours.values())))
    except Unknown as why:
        return str(why)


def _trained(run: Run, base: Path, storage: Storage | None) -> GPT:
    """Returns the run's model in float32, its base as `storage` holds it."""
    types = set(_types(base))
    held = types.pop() if len(types) == 1 else torch.float32
    return in_float32(build_run(run, base, held if storage is None else run.dtype, storage=storage))


def main_dtype(base: Path) -> torch.dtype:
    """Returns the dtype of most bytes of a folder's weights."""
    sizes = _types(base)
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def _types(base: Path) -> dict[torch.dtype, int]:
    """Returns the bytes of the base's weights in each dtype; float64 counts as float32."""
    sizes: dict[torch.dtype, int] = {}
    for header in Weights(base).headers.values():
        for entry in header.values():
            first, last = entry["data_offsets"]
            if entry["dtype"] in DTYPES:  # some files also hold masks of booleans
                dtype = torch.float32 if entry["dtype"] == "F64" else DTYPES[entry["dtype"]]
                sizes[dtype] = sizes.get(dtype, 0) + last - first
    return sizes


def _names(method: Method, base: Path) -> NameMap:
    """Returns the names of the merged model's tensors: the base's, and those that the method adds."""
    config = read_json(base / "config.json", "config.json of the base")
    describe(config, method)
    return NameMap(*config_of(config, str(base)))


@torch.no_grad()
def _folded(
    model: GPT, names: NameMap, rounded: Callable[[str, Tensor, bool], tuple[Tensor, Tensor]], rounding: Rounding
) -> Iterator[tuple[str, Tensor]]:
    """Yields the folded parameters by our names, as `rounded` writes them.

    It is given a name, the exact tensor, and whether that is the base's own; it returns what to write, and the numbers
    that this stands for.
    """
    left = {ours: shape for ours, shape in names.ours.items() if ours not in model.base_keys}
    for ours, exact, before in folds(model, Scratch()):
        written, after = rounded(ours, exact, exact is before)
        before = model.base_values.get(ours, torch.zeros_like(exact) if before is None else before)
        if before is not exact:
            rounding.add(exact, after, before)
        yield ours, written
        left.pop(ours, None)
        model.files.drop_pages(written.nbytes)
    for ours, shape in left.items():  # biases of other layers
        yield ours, rounded(ours, torch.zeros(shape), True)[0]


def _merged(
    model: GPT, names: NameMap, dtype: torch.dtype, rounding: Rounding, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yields the folded weights under their Hugging Face names, rounded once to the files' dtype."""

    def rounded(ours: str, exact: Tensor, is_base: bool) -> tuple[Tensor, Tensor]:
        after = exact.to(dtype, copy=not is_base)
        return after, after

    yield from names.written(_folded(model, names, rounded, rounding), where=where)


def _coded(model: GPT, files: GgufFolder, rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    """Yields the bytes of the folded weights for a GGUF file: as groups of integers where the run held them so."""

    def rounded(ours: str, exact: Tensor, is_base: bool) -> tuple[Tensor, Tensor]:
        if ours in files.in_groups:
            rows = q4_1(*held_in_groups(model.get_submodule(ours.removesuffix(".weight"))))
        else:
            rows = files.encoder(ours, exact)
        return rows, exact if is_base else files.encoder.read(ours, rows)

    yield from _folded(model, files.layout.names, rounded, rounding)
    if files.in_groups:
        say(f"{len(files.in_groups)} linear layers keep their codes and scales (Q4_1)")


def _in_groups(model: GPT) -> set[str]:
    """Returns the names of the weights that keep their codes."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear))
    return {f"{name}.weight" for name, layer in layers if held_in_groups(layer) is not None}


def _tell_of_original(run: Run, base: Path, prompts: list[list[int]], want: Tensor) -> None:
    """Says how far the merged model is from the run, whose delta was trained on quantised weights."""
    trained = logits_of(_trained(run, base, run.storage), prompts)
    off = float((want - trained).norm() / trained.norm())
    same = float((want.argmax(-1) == trained.argmax(-1)).float().mean())
    say(
        f"warning: --onto original: the delta was trained on weights in {run.storage.name}, and is merged into others: "
        f"logits differ from the run's by {off:.1%} (relative norm), same next token at {same:.0%}"
    )
