"""The command `new`: a model of random weights with the shape that a config.json describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litpeft.core.errors import ConfigError, nearest, quoted, scaled
from litpeft.core.folders import atomic_folder, locked
from litpeft.core.json import read_json, write_json
from litpeft.core.place import check_place
from litpeft.core.recognise import refuse_other
from litpeft.core.safetensors import RESULT_DTYPES, check_room, copy_companions, write_safetensors
from litpeft.core.terminal import command_line, say
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.convert import check, keep_source, tell_stop_ids
from litpeft.exchange.run import write_config
from litpeft.exchange.settings import New
from litpeft.model.families import FAMILIES, family
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.initial import initial_weights

ANY = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")  # keys that the families' tables leave out
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def new(settings: New) -> None:
    """Writes the folder `settings.out` and checks it."""
    source, out = Path(settings.source), Path(settings.out)
    refuse_other(source)
    hf = read_json(source / "config.json", "config.json of a model")
    check_changes(settings.changes, hf)
    hf = {key: value for key, value in (hf | settings.changes).items() if key != "quantization_config"}
    where = f"{source / 'config.json'}{', with the changes' if settings.changes else ''}"
    names = NameMap(*config_of(hf, where))
    Tokenizer.load(source).check_vocabulary(names.config.vocab_size)
    keep_source(source, out)
    check_place(out)
    dtype = RESULT_DTYPES[settings.dtype]
    check_room(out, names.shapes.values(), dtype)
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        copy_companions(source, folder)
        write_json(folder / "config.json", hf)
        write_config(folder, dtype)
        own = ((ours, tensor.to(dtype)) for ours, tensor in initial_weights(names, hf, settings.seed))
        write_safetensors(folder, names.written(own, where=str(source)))
        tell_stop_ids(folder)
        count, parameters, written = check(folder, settings.source)
        size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"wrote {out}: {names.family}, {parameters / 1e6:.1f} M random parameters in {written}, {scaled(size, 'B')}")
    say(f"checked: {count} tensors, every one finite, names and shapes as config.json asks")
    rows = ("--data.path", "TEXTS", "--out", f"out/{out.name}")
    say(f"next: {command_line('finetune', 'full', '--base.dir', out, *rows)}")


def check_changes(changes: Mapping[str, Any], hf: Mapping[str, Any]) -> None:
    """Raises for a key that neither the config.json nor its family has."""
    name = changes.get("model_type", hf.get("model_type"))
    keys = family(name).Keys.spelt(hf) if isinstance(name, str) and name in FAMILIES else []
    known = sorted({*hf, *ANY, *ROTARY, *(spelling for _, spelling, _ in keys)})
    for key in changes:
        if key not in known:
            what = f"config.json of {name} has no key {quoted(key)}{nearest(key, known)}"
            raise ConfigError(what, where="changes", hint=f"its keys are {', '.join(known)}")
