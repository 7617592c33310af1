"""The command `merge`: folds a run's delta into its base and checks that the files compute what the run computes.

Layer by layer in float32; the base's weights stay memory-mapped in their own dtype.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.folders import COMPANIONS, atomic_folder, check_place, locked, refuse_existing, sync_files
from litpeft.core.json import read_json
from litpeft.core.safetensors import DTYPES, RESULT_DTYPES, Weights, copy_companions, write_safetensors
from litpeft.core.terminal import command_line, say
from litpeft.data.tokenizer import Tokenizer, write_added_tokens
from litpeft.exchange.compare import PROMPTS, Scratch, check, in_float32, logits_of, three_ways
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.gguf.weights import GgufFile
from litpeft.exchange.gguf.write import Q4_1, TYPES, check_gguf, dequantised, held_in_groups, q4_1, write_gguf
from litpeft.exchange.rounding import Rounding
from litpeft.exchange.run import Run, build_run, find_run, tell_progress, write_config
from litpeft.exchange.settings import Merge
from litpeft.model.added_tokens import describe, note_tokens
from litpeft.model.build import build
from litpeft.model.delta import Method, folds
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.slots import Linear

GGUF = "model.gguf"


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
    sizes = _types(base)
    dtype = RESULT_DTYPES.get(settings.dtype) or max(sizes, key=sizes.__getitem__, default=torch.float32)
    method = run.method()
    note_tokens(method, tokenizer)
    names = _names(method, base)
    if settings.to == "gguf":
        check_gguf(names)
    model = _trained(run, base, storage)
    prompts, rounding = [tokenizer.encode(text) for text in PROMPTS], Rounding()
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        try:
            if settings.to == "gguf":
                write_gguf(folder / GGUF, names, _coded(model, dtype, rounding), tokenizer, template.stop_ids)
            else:
                write_safetensors(folder, _merged(model, names, dtype, rounding, settings.run))
        except TypeError as error:
            hint = "generate and chat take the run as it is"
            raise ModelError(f"this run cannot be merged: {error}", where=settings.run, hint=hint) from None
        if settings.to == "safetensors":
            copy_companions(base, folder)
            copy_companions(run.texts(base), folder, COMPANIONS[2:])
            write_config(folder, dtype, method)
            write_added_tokens(folder, tokenizer)
            write_stop_ids(folder, template.stop_ids)
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(sync_files, folder)  # flush to disk while the models are compared
            want, before, fold = three_ways(model, prompts)
            del model  # two models may not fit in memory
            written.result()
            read = _logits_of_gguf if settings.to == "gguf" else _logits_of_folder
            files = read(folder, dtype, prompts)
        say(
            f"logits at {len(want)} positions of {len(PROMPTS)} prompts, "
            f"compared with base + delta (largest {float(want.abs().max()):.1f}):"
        )
        say(f"  {'the base without the delta':<32} differs by {float((before - want).abs().max()):.2e}")
        if storage != run.storage:
            _tell_of_original(run, base, prompts, want)
        halves = settings.to == "gguf" and dtype == torch.float32  # the constants of groups are float16
        check(want, fold, files, torch.float16 if halves else dtype, rounding, settings.run)
    if settings.to == "gguf":
        say(f"merged model in {out / GGUF}; next: llama.cpp, or {command_line('convert', out / GGUF)} OUT")
    else:
        say(f"merged model in {out}; next: {command_line('chat', out)}")


def _trained(run: Run, base: Path, storage: Storage | None) -> GPT:
    """Returns the run's model in float32, its base as `storage` holds it."""
    types = set(_types(base))
    held = types.pop() if len(types) == 1 else torch.float32
    return in_float32(build_run(run, base, held if storage is None else run.dtype, storage=storage))


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


def _merged(
    model: GPT, names: NameMap, dtype: torch.dtype, rounding: Rounding, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yields the folded weights under their Hugging Face names, rounded once to the files' dtype."""

    def rounded() -> Iterator[tuple[str, Tensor]]:
        left = {ours: shape for ours, shape in names.ours.items() if ours not in model.base_keys}
        for ours, exact, before in folds(model, Scratch()):
            after = exact.to(dtype, copy=exact is not before)
            before = model.base_values.get(ours, torch.zeros_like(exact) if before is None else before)
            if before is not exact:
                rounding.add(exact, after, before)
            yield ours, after
            left.pop(ours, None)
            model.files.drop_pages(after.nbytes)
        yield from ((ours, torch.zeros(shape, dtype=dtype)) for ours, shape in left.items())  # biases of other layers

    with torch.no_grad():
        yield from names.written(rounded(), where=where)


def _coded(model: GPT, dtype: torch.dtype, rounding: Rounding) -> Iterator[tuple[str, Tensor, Any]]:
    """Yields the folded weights for a GGUF file, by our names: as groups of integers where the run held them so."""
    kept = layers = 0
    with torch.no_grad():
        for ours, exact, before in folds(model, widened=Scratch()):
            module, _, leaf = ours.rpartition(".")
            layer = model.get_submodule(module)
            codes = held_in_groups(layer) if leaf == "weight" and isinstance(layer, Linear) else None
            wanted = torch.float32 if exact.ndim == 1 else dtype
            after = exact.to(wanted, copy=True) if codes is None else dequantised(*codes)
            before = model.base_values.get(ours, torch.zeros_like(exact) if before is None else before)
            if before is not exact:
                rounding.add(exact, after, before)
            layers, kept = layers + (before is not exact), kept + (codes is not None)
            yield ours, *((after, TYPES[wanted]) if codes is None else (q4_1(*codes), Q4_1))
    say(f"{kept or 'no'} linear layers keep their codes and scales (Q4_1)")


def _logits_of_folder(folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> Tensor:
    return logits_of(in_float32(build(folder, dtype)), prompts)


def _logits_of_gguf(folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> Tensor:
    """Returns the logits of a GGUF file as `convert` reads it; raises if its tokenizer is another one."""
    with TemporaryDirectory(dir=folder) as read:
        GgufFile(folder / GGUF).write(Path(read), torch.float32)
        if [Tokenizer.load(Path(read)).encode(text) for text in PROMPTS] != prompts:
            what = "the tokenizer of the GGUF file gives other ids: nothing was written"
            raise ModelError(what, where=folder, hint="write safetensors, and convert them with llama.cpp")
        return _logits_of_folder(Path(read), torch.float32, prompts)


def _tell_of_original(run: Run, base: Path, prompts: list[list[int]], want: Tensor) -> None:
    """Says how far the merged model is from the run, whose delta was trained on quantised weights."""
    trained = logits_of(_trained(run, base, run.storage), prompts)
    off = float((want - trained).norm() / trained.norm())
    same = float((want.argmax(-1) == trained.argmax(-1)).float().mean())
    say(
        f"warning: --onto original: the delta was trained on weights in {run.storage.name}, and is merged into others: "
        f"logits differ from the run's by {off:.1%} (relative norm), same next token at {same:.0%}"
    )
