"""The models that a server answers for: runs beside their base, as far as one pass can compute them all."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from litpeft.core.precision import pick_device, pick_precision, start_device
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.result import Run
from litpeft.exchange.run import find_run, tell_outdated, tell_progress
from litpeft.generate.batch import PART, Batch
from litpeft.generate.load import Loaded, load_one, make_fast, named
from litpeft.generate.settings import Serve
from litpeft.model.build import build
from litpeft.model.by_row import add_by_row, affine_maps, deltas_beside
from litpeft.model.families.read import read_config
from litpeft.model.quantize import Storage
from litpeft.model.quantize.cache import Cache


@dataclass
class Served:
    """A model that requests name, and the batch that computes its answers."""

    loaded: Loaded
    batch: Batch
    adapter: int = 0  # the number of its run, where several are beside one base


def load_served(settings: Serve) -> dict[str, Served]:
    """Returns what the settings name, by the folders' names, and the bases that are held for runs.

    Runs of one base are computed beside it if all they do is an affine map in linear layers. Every other run is a model
    of its own, whose weights are held once where they are the base's.
    """
    start_device()
    paths, served = named(settings), {}
    runs = {name: run for name, path in paths.items() if (run := find_run(Path(path))) is not None and not run.is_model}
    bases: dict[tuple[Path, Storage | None], dict[str, Run]] = {}
    for name, run in runs.items():
        if settings.method and paths[name] == settings.model:
            continue
        folder = run.find_base(settings.base)
        storage = None if run.storage is None else replace(run.storage, cache=False)
        bases.setdefault((folder.resolve(), storage), {})[name] = run
    wanted = settings.quantize and Storage(settings.quantize).key
    for (folder, storage), of_base in bases.items():
        same = (storage and storage.key) == wanted
        named_so = (name for name, path in paths.items() if same and Path(path).resolve() == folder)
        base = next(named_so, folder.name if folder.name not in {*paths, *served} else None)
        served |= load_beside(folder, storage, of_base, settings, base)
    for name, path in paths.items():
        if name not in served:
            loaded = load_one(settings, path, [one.loaded for one in served.values()])
            served[name] = Served(loaded, Batch(loaded.model, settings.batch_size, PART))
    return {name: served[name] for name in (*paths, *(name for name in served if name not in paths))}


def load_beside(
    folder: Path, storage: Storage | None, runs: dict[str, Run], settings: Serve, base: str | None
) -> dict[str, Served]:
    """Returns those of the `runs` that can be computed beside their base, and the base by the name `base`, if given."""
    _, config = read_config(folder)
    saved = {name: (run.method(), run.delta()) for name, run in runs.items()}
    alone = {name: deltas_beside(config, method, storage, delta) for name, (method, delta) in saved.items()}
    if not any(alone.values()):
        return {}
    device = pick_device()
    held = None if storage is None else replace(storage, cache=Cache(folder, storage.key, "").folder.is_dir())
    model = build(folder, pick_precision(settings.precision, device).weights, device=device, storage=held)
    maps = {name: affine_maps(model, deltas, *saved[name]) for name, deltas in alone.items() if deltas is not None}
    maps = {name: found for name, found in maps.items() if found is not None}
    if not maps:
        return {}
    add_by_row(model, list(maps.values()))
    make_fast(model)
    batch, served = Batch(model, settings.batch_size, PART), {}
    texts: dict[str, tuple[Tokenizer, ChatTemplate]] = {}  # of what the runs recorded: most have the same
    for number, name in enumerate(maps, 1):
        run = runs[name]
        run.check_base(folder)
        tell_progress(run)
        tell_outdated(run.place)
        said = run.facts["template"] | {"system": None}, run.facts["base"].get("tokenizer")
        recorded = json.dumps([str(run.texts(folder)), *said])
        if recorded not in texts:
            texts[recorded] = run.tokenizer_and_template(folder, settings.template_options)
            texts[recorded][0].check_vocabulary(model.config.vocab_size)
        served[name] = Served(Loaded(model, *texts[recorded], run.system, run), batch, number)
    if base is not None:
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate(tokenizer, options=settings.template_options, is_setting=False)
        served[base] = Served(Loaded(model, tokenizer, template, None, None), batch)
    return served
