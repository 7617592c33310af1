"""The command `convert`: makes a Hugging Face folder of a GGUF file, or of pickled weights (.bin, or Meta's .pth).

With `to` it writes a model or run for another program: see export.py.
"""

import math
import os
from pathlib import Path

from litpeft.core.errors import ConfigError, ModelError, UserError, scaled
from litpeft.core.folders import atomic_folder, locked
from litpeft.core.place import check_place
from litpeft.core.recognise import refuse_other
from litpeft.core.safetensors import RESULT_DTYPES, Weights, is_finite
from litpeft.core.terminal import command_line, say
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.bin import BinFolder
from litpeft.exchange.export import export
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.gguf.weights import GgufFile
from litpeft.exchange.imports.meta import MetaFolder, is_meta
from litpeft.exchange.push import check_repo, push, write_card
from litpeft.exchange.settings import Convert
from litpeft.exchange.text_model import TextModel, holds_text_model
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

PICKLED = (".pth", ".pt", ".ckpt", ".bin")


def convert(settings: Convert) -> None:
    """Writes the folder `settings.out` and checks it."""
    if settings.to is not None:
        return export(settings)
    source, out = Path(settings.source), Path(settings.out)
    dtype = RESULT_DTYPES[settings.dtype] if settings.dtype else None
    gguf_file = find_gguf(source)
    check_repo(settings.push)
    keep_source(source, out)
    model = GgufFile(gguf_file) if gguf_file else of_folder(source)
    say(f"read {gguf_file or source}: {model.summary()}")
    check_place(out)
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        model.write(folder, dtype)
        tell_stop_ids(folder)
        if settings.push:
            write_card(folder, settings.push, source, None, "Safetensors")
        count, parameters, written = check(folder, settings.source)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    size, files = scaled(sum(sizes.values()), "B"), ", ".join(sizes)
    say(f"wrote {out}: {parameters / 1e6:.1f} M parameters in {written}, {size}: {files}")
    say(f"checked: {count} tensors, every one finite, names and shapes as config.json asks")
    if settings.push:
        push(out, settings.push)
    say(f"next: {command_line('chat', out)}")


def keep_source(source: Path, out: Path) -> None:
    """Raises if the result would replace what it is made of."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        what = "the source lies in it, and would be lost when it is replaced"
        raise ConfigError(what, where=out, hint="name another folder for the result")


def of_folder(source: Path) -> BinFolder | MetaFolder | TextModel:
    """Returns the model of a folder of weights that is to be converted."""
    if is_meta(source):
        return MetaFolder(source)
    return TextModel(source) if holds_text_model(source) else BinFolder(source)


def tell_stop_ids(folder: Path) -> None:
    """Writes the ids that end an answer into generation_config.json, if the tokenizer and template can be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    try:
        write_stop_ids(folder, ChatTemplate(Tokenizer.load(folder), is_setting=False).stop_ids)
    except UserError as error:  # other programs may still use the weights
        say(f"generation_config.json is left as it is, since an answer's end is not known: {error.what}")


def find_gguf(source: Path) -> Path | None:
    """Returns the GGUF file that `source` is or holds, None for a folder of weights; raises for anything else."""
    if not os.path.exists(source):  # Path.exists would raise for a name that is too long
        raise ConfigError("there is no such file or folder", where=source)
    if source.is_file():
        if source.suffix == ".gguf":
            return source
        if source.suffix == ".safetensors":
            refuse_safetensors(source.parent)
        hint = "convert takes a .gguf file, or the Hugging Face folder that holds config.json and pytorch_model*.bin"
        what = f"a single {source.suffix or 'plain'} file is not a model folder"
        if source.suffix in PICKLED:
            what += ": it does not say what its tensors are"
        raise ConfigError(what, where=source, hint=hint)
    if any(source.glob("*.safetensors")):
        if holds_text_model(source):
            return None
        refuse_safetensors(source)
    files = sorted(source.glob("*.gguf")) or sorted(source.glob("*/*.gguf"))
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(source)) for file in files[:5])
        raise ConfigError(f"{len(files)} GGUF files: {names}", where=source, hint="name one of them")
    if files:
        return files[0]
    if any(source.glob("pytorch_model*.bin")) or is_meta(source):
        return None
    refuse_other(source)
    what = "there is no .gguf and no pytorch_model*.bin in it"
    if any(file.suffix in PICKLED for file in source.iterdir()):
        what += "; of .pth files those of Meta's layout are read (consolidated.00.pth, …), of .ckpt files none"
    raise ConfigError(what, where=source, hint="take the Hugging Face edition of the model: `litpeft download --help`")


def refuse_safetensors(folder: Path) -> None:
    """Raises: a folder of safetensors needs no conversion, unless it is an adapter or the like."""
    refuse_other(folder)
    hint = f"try `{command_line('chat', folder)}`"
    raise ConfigError("needs no conversion: use it where it lies", where=folder, hint=hint)


def check(folder: Path, source: str) -> tuple[int, int, str]:
    """Reads a written folder again; returns the number of its tensors and of its parameters, and their dtypes."""
    weights = Weights(folder)
    try:
        NameMap(*read_config(folder)).check(weights)
    except UserError as error:  # name the source: the folder is about to be removed
        error.where, error.hint = source, "the source is incomplete, or of another model"
        raise
    dtypes = set()
    for name in weights.file_of:
        tensor = weights.read(name)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if not is_finite(tensor):
            hint = "the source is damaged; or, with --dtype float16, its numbers are too large: take bfloat16"
            raise ModelError(f"{name} holds numbers that are not finite", where=source, hint=hint)
        weights.drop_pages(tensor.nbytes)
    shapes = [weights.shape(name) for name in weights.file_of]
    return len(shapes), sum(map(math.prod, shapes)), " and ".join(sorted(dtypes))
