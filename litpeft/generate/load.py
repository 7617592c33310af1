"""A model ready to answer, from a base folder, a merged folder or a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, UserError
from litpeft.core.precision import pick_device, pick_precision, start_device
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import Run, build_run, find_run, tell_outdated, tell_progress
from litpeft.generate.cpu.fused_block import fuse_blocks
from litpeft.generate.cpu.pack import pack_weights
from litpeft.generate.gpu.fused_block import fuse_blocks as fuse_gpu_blocks
from litpeft.generate.settings import Answering, Evaluate
from litpeft.model.build import build
from litpeft.model.delta import without_delta
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage, storage_class
from litpeft.model.quantize.cache import Cache
from litpeft.model.slots import Linear


@dataclass
class Loaded:
    """A model ready to answer, with what it needs to read and write text."""

    model: GPT
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None  # the system message that it was trained with
    run: Run | None

    @property
    def has_delta(self) -> bool:
        return self.run is not None and not self.run.is_model


def load_model(
    path: str,
    base: str | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    method: Mapping[str, Any] | None = None,
    beside: Sequence[Loaded] = (),
    template_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Returns the model of a base folder, a merged folder or a run, in eval mode on the first device there is.

    `quantize` names the storage of its linear layers; a delta's base is held as it was in training. `method` are keys
    of a run's method that are to have other values; `template_options` is what its chat template is told. What is the
    same in a model that is loaded already, `beside`, is held once.
    """
    start_device()  # beside the tokenizer
    device = pick_device()
    dtype = pick_precision(precision, device).weights
    run = find_run(Path(path))
    tell_progress(run)
    tell_outdated(Path(path))
    has_delta = run is not None and not run.is_model
    if base is not None and not has_delta:
        raise ConfigError("base is for a run with a delta, and this is a model by itself", where="base")
    if method and not has_delta:
        raise ConfigError("it is for a run with a delta, and this is a model by itself", where="method")
    if quantize is not None:
        storage_class(quantize, "quantize")
    if quantize is not None and has_delta:
        held = "not quantised" if run.storage is None else f"in {run.storage.key}"
        what = f"the delta was trained on a base that was {held}: that is how it is used"
        raise ConfigError(what, where="quantize", hint="merge the run first, or leave it out")
    if run is None:
        folder = Path(path)
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate(tokenizer, options=template_options, is_setting=False)
    else:
        folder = run.find_base(base) if has_delta else run.model_folder()
        tokenizer, template = run.tokenizer_and_template(folder, template_options)
    if has_delta:
        storage = run.storage
        if storage is not None:  # an existing cache is read, none is written
            storage = replace(storage, cache=Cache(folder, storage.key, "").folder.is_dir())
        try:
            model = build_run(run, folder, dtype, device, storage, method)
        except UserError:
            run.check_base(folder)  # another base may be the cause
            raise
        run.check_base(folder)
    else:
        model = build(folder, dtype, device=device, storage=None if quantize is None else Storage(quantize))
    make_fast(model, beside)
    tokenizer.check_vocabulary(model.config.vocab_size)
    return Loaded(model, tokenizer, template, run.system if run else None, run)


def make_fast(model: GPT, beside: Sequence[Loaded] = ()) -> None:
    """Prepares a model for answers, in place; what is the same in those `beside` is held once."""
    model.eval().requires_grad_(False)
    kind = model.embed.weight.device.type
    if kind == "cpu":
        pack_weights(model)
    for other in beside:
        share(model, other.model)
    if kind == "cpu":
        fuse_blocks(model)
    elif kind == "cuda":
        fuse_gpu_blocks(model)


def share(model: GPT, other: GPT) -> None:
    """Lets a model hold the same memory as another where their numbers are equal, as those of one base are.

    `fuse_blocks` comes after: what it makes holds pointers.
    """
    theirs = held(other)
    for name, tensor in held(model).items():
        if name in theirs and alike(tensor, theirs[name]):
            tensor.data = theirs[name].data


def held(model: GPT) -> dict[str, Tensor]:
    """Returns all tensors of a model by name, those of packed layers too."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():
        packed = vars(module.packed_in) if isinstance(module, Linear) and module.packed_in else {}
        tensors |= {f"{name}.packed_in.{key}": value for key, value in packed.items() if isinstance(value, Tensor)}
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def alike(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors hold the same numbers in the same way."""
    if (a.shape, a.dtype, a.layout, a.device) != (b.shape, b.dtype, b.layout, b.device):
        return False
    return torch.equal(a.to_dense(), b.to_dense()) if a.is_mkldnn else torch.equal(a, b)


def load_models(settings: Answering) -> dict[str, Loaded]:
    """Returns the model that answers, and those that may answer in its place, by their folders' names."""
    loaded: dict[str, Loaded] = {}
    for name, path in named(settings).items():
        loaded[name] = load_one(settings, path, tuple(loaded.values()))
    return loaded


def load_one(settings: Answering, path: str, beside: Sequence[Loaded] = ()) -> Loaded:
    """Returns one of the models that the settings name; their `method` is that of the first."""
    method = settings.method if path == settings.model else None
    told = settings.template_options
    return load_model(path, settings.base, settings.precision, settings.quantize, method, beside, told)


def named(settings: Answering) -> dict[str, str]:
    """Returns the path of each model by its folder's name."""
    found: dict[str, str] = {}
    for path in (settings.model, *settings.also):
        folder = Path(path).absolute()
        name = folder.parent.name if folder.name == "final" else folder.name
        if name in found:
            hint = "name each once; of two folders with one name rename one"
            raise ConfigError(f"{found[name]} and {path} are both called {name}", where="also", hint=hint)
        found[name] = path
    for path in settings.also:
        find_run(Path(path))  # what is none is refused before the first one has answered for hours
    return found


def load_measured(settings: Evaluate) -> Loaded:
    """Returns the model to measure."""
    run = find_run(Path(settings.model))
    apart = settings.compare_base and run is not None and run.is_model  # then the base is a second model
    return load_one(replace(settings, base=None) if apart else settings, settings.model)


@contextmanager
def as_base(loaded: Loaded, settings: Evaluate) -> Iterator[None]:
    """Makes a run its base, with the run's template: while the block lasts, or for good if the run is a whole model."""
    if not loaded.has_delta:  # the run's result is a model of its own: load the base in its place
        loaded.model = load_model(
            str(loaded.run.base_folder(settings.base)), precision=settings.precision, quantize=settings.quantize
        ).model
    with without_delta(loaded.model):
        yield
