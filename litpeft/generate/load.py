"""A model ready to answer, from a base folder, a merged folder or a run."""

from dataclasses import dataclass, replace
from pathlib import Path

from litpeft.core.errors import ConfigError
from litpeft.core.precision import pick_device, pick_precision
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import Run, build_run, find_run, tell_progress
from litpeft.generate.cpu.fused_block import fuse_blocks
from litpeft.generate.cpu.pack import pack_weights
from litpeft.model.build import build
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage, storage_class
from litpeft.model.quantize.cache import Cache


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


def load_model(path: str, base: str | None = None, precision: str = "auto", quantize: str | None = None) -> Loaded:
    """Returns the model of a base folder, a merged folder or a run, in eval mode on the first device there is.

    `quantize` names the storage of its linear layers; a delta's base is held as it was in training.
    """
    device = pick_device()
    dtype = pick_precision(precision, device).weights
    run = find_run(Path(path))
    tell_progress(run)
    has_delta = run is not None and not run.is_model
    if base is not None and not has_delta:
        raise ConfigError("base is for a run with a delta, and this is a model by itself", where="base")
    if quantize is not None:
        storage_class(quantize, "quantize")
    if quantize is not None and has_delta:
        held = "not quantised" if run.storage is None else f"in {run.storage.key}"
        what = f"the delta was trained on a base that was {held}: that is how it is used"
        raise ConfigError(what, where="quantize", hint="merge the run first, or leave it out")
    if run is None:
        folder = Path(path)
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate(tokenizer, is_setting=False)
    else:
        folder = run.base_folder(base) if has_delta else run.model_folder()
        tokenizer, template = run.tokenizer_and_template(folder)
    if has_delta:
        storage = run.storage
        if storage is not None:  # an existing cache is read, none is written
            storage = replace(storage, cache=Cache(folder, storage.key, "").folder.is_dir())
        model = build_run(run, folder, dtype, device, storage)
    else:
        model = build(folder, dtype, device=device, storage=None if quantize is None else Storage(quantize))
    model.eval().requires_grad_(False)
    if device.type == "cpu":
        pack_weights(model)
        fuse_blocks(model)
    tokenizer.check_vocabulary(model.config.vocab_size)
    return Loaded(model, tokenizer, template, run.system if run else None, run)
