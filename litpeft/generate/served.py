"""The models that a server answers for: runs beside their base, as far as one pass can compute them all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from litpeft.core.checksums import hub_origin
from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.precision import pick_device, pick_precision, start_device
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.imports.peft import PeftRun
from litpeft.exchange.result import Run
from litpeft.exchange.run import find_run, tell_outdated, tell_progress
from litpeft.generate.batch import PART, Batch
from litpeft.generate.cpu.native_weights import NativeLinears
from litpeft.generate.load import Loaded, load_one, make_fast, named
from litpeft.generate.settings import Serve
from litpeft.model.affine import Affine
from litpeft.model.build import build
from litpeft.model.by_row import add_by_row, affine_maps, deltas_beside, put_run
from litpeft.model.families.read import read_config
from litpeft.model.quantize import Storage
from litpeft.model.quantize.cache import Cache
from litpeft.model.slots import Linear

RECORDS = ("final/delta.json", "delta.json", "adapter_config.json")  # one of them is in the folder of a run
Held = tuple[Path, Storage | None]  # a base's folder, and how its weights are held
APART = "name it with --also, which holds it all the time"
Maps = Mapping[str, Affine]  # what a run does, by the names of linear layers


@dataclass
class Served:
    """A model that requests name, and the batch that computes its answers."""

    loaded: Loaded
    batch: Batch
    adapter: int = 0  # the number of its run, where several are beside one base


class Base:
    """A base that is held, and the runs beside it."""

    def __init__(self, held: Held, settings: Serve):
        (self.folder, self.storage), self.settings = held, settings
        storage, device = self.storage, pick_device()
        if storage is not None:
            storage = replace(storage, cache=Cache(self.folder, storage.key, "").folder.is_dir())
        dtype = pick_precision(settings.precision, device).weights
        self.model = build(self.folder, dtype, device=device, storage=storage)
        self.batch: Batch | None = None
        self.places: Sequence[int] = ()  # numbers of runs that come later
        self.texts: dict[str, tuple[Tokenizer, ChatTemplate]] = {}  # of what the runs recorded: most have the same

    def begin(self, runs: Sequence[Maps], spare: int) -> None:
        """Makes the model ready to answer for runs 1, 2, ..., and for as many as are spare that come later."""
        add_by_row(self.model, runs, spare)
        make_fast(self.model)
        self.batch = Batch(self.model, self.settings.batch_size, PART)
        self.places = range(len(runs) + 1, len(runs) + 1 + spare)

    def read(self, path: Path) -> tuple[Loaded, Callable[[], Maps]]:
        """Returns a run that comes later, and what computes its maps.

        Both raise ModelError if it is not one that can be beside this base.
        """
        run = find_run(path)
        if run is None or run.is_model:
            raise ModelError("it is a model by itself, and not beside a base", where=path, hint=APART)
        if "fingerprint" in run.facts["base"]:  # the base is known by its contents, wherever it was in training
            run.find_base(str(self.folder))
        elif (named := self.named_base(run)) != self.folder:
            raise ModelError(f"its base is {named}, and the one here is {self.folder}", where=path)
        if (held := held_in(run)) != self.storage:
            was, here = (storage.key if storage else "plain weights" for storage in (held, self.storage))
            raise ModelError(f"it was trained on a base in {was}, and the one here is in {here}", where=path)
        run.check_base(self.folder)
        method, delta = run.method(), run.delta()
        alone = deltas_beside(self.model.config, method, self.storage, delta)
        apart = ModelError(f"its {run.facts['method']} is not computed beside a base", where=path, hint=APART)
        if alone is None:
            raise apart

        def maps() -> Maps:
            found = affine_maps(self.model, alone, method, delta)
            if found is None:
                raise apart
            return found

        return self.loaded(run), maps

    def named_base(self, run: PeftRun) -> Path:
        """Returns the folder of the base that an adapter of peft names, if only as the hub calls it."""
        try:
            return run.find_base(self.settings.base).resolve()
        except ModelError:
            named, origin = run.keys.base_model_name_or_path or "", hub_origin(self.folder)
            if named not in (self.folder.name, origin and origin[0]) and Path(named).name != self.folder.name:
                raise
            return run.find_base(str(self.folder)).resolve()

    def put(self, number: int, maps: Callable[[], Maps]) -> None:
        """Puts a run that `read` returned in one of the `places`; the run that was there must have no open requests.

        Call it between two steps, in the thread that computes them: nothing else computes on a GPU meanwhile.
        """
        moved = put_run(self.model, number, maps())
        for packed in {layer.packed_in for layer in self.model.modules() if isinstance(layer, Linear)}:
            if isinstance(packed, NativeLinears) and packed.runs:
                packed.put(number)
        self.batch.forget(number, moved)

    def loaded(self, run: Run) -> Loaded:
        """Returns a run with its tokenizer and template; `run.check_base` has passed."""
        tell_progress(run)
        tell_outdated(run.place)
        said = run.facts["template"] | {"system": None}, run.facts["base"].get("tokenizer")
        recorded = json.dumps([str(run.texts(self.folder)), *said])
        if recorded not in self.texts:
            texts = run.tokenizer_and_template(self.folder, self.settings.template_options)
            texts[0].check_vocabulary(self.model.config.vocab_size)
            self.texts[recorded] = texts
        return Loaded(self.model, *self.texts[recorded], run.system, run)

    def alone(self) -> Loaded:
        """Returns the base without a run."""
        tokenizer = Tokenizer.load(self.folder)
        template = ChatTemplate(tokenizer, options=self.settings.template_options, is_setting=False)
        return Loaded(self.model, tokenizer, template, None, None)


def load_served(settings: Serve) -> tuple[dict[str, Served], Base | None]:
    """Returns the models to answer for, by name, and the base of the runs in the folder `settings.runs`, if any.

    The names are those of the folders that the settings name, and of the bases that are held for runs.
    Runs of one base are computed beside it if all they do is an affine map in linear layers. Every other run is a model
    of its own, whose weights are held once where they are the base's.
    """
    if settings.runs is not None:
        check_runs(Path(settings.runs))
    start_device()
    paths, served, grown = named(settings), {}, None
    runs = {name: find_run(Path(path)) for name, path in paths.items()}
    later = None if settings.runs is None else base_of(next(iter(runs.values())), settings)
    groups: dict[Held, dict[str, Run]] = {} if later is None else {later: {}}
    for name, run in runs.items():
        changed = settings.method and paths[name] == settings.model
        if run is not None and not run.is_model and not changed:
            groups.setdefault(base_of(run, settings), {})[name] = run
    wanted = settings.quantize and Storage(settings.quantize).key
    for held, of_base in groups.items():
        folder, storage = held
        same = (storage and storage.key) == wanted
        called = (name for name, path in paths.items() if same and Path(path).resolve() == folder)
        name = next(called, folder.name if folder.name not in {*paths, *served} else None)
        base, beside = load_beside(held, of_base, settings, name, settings.runs_held if held == later else 0)
        served |= beside
        grown = base if held == later else grown
    for name, path in paths.items():
        if name not in served:
            loaded = load_one(settings, path, [one.loaded for one in served.values()])
            served[name] = Served(loaded, Batch(loaded.model, settings.batch_size, PART))
    return {name: served[name] for name in (*paths, *(name for name in served if name not in paths))}, grown


def check_runs(folder: Path) -> None:
    """Raises unless a folder may hold runs."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", where="runs")
    if any((folder / name).exists() for name in ("run.yaml", "config.json", *RECORDS)):
        hint = "name the folder that it is in, or give it by --also"
        raise ConfigError(f"{folder} is a run or a model itself", where="runs", hint=hint)


def base_of(run: Run | None, settings: Serve) -> Held:
    """Returns the base of a run. A model folder, or a run that is a whole model, is its own base."""
    if run is None or run.is_model:
        folder = Path(settings.model) if run is None else run.folder
        return folder.resolve(), None if settings.quantize is None else Storage(settings.quantize)
    return run.find_base(settings.base).resolve(), held_in(run)


def held_in(run: Run) -> Storage | None:
    """Returns how a run's base is held."""
    return None if run.storage is None else replace(run.storage, cache=False)


def load_beside(
    held: Held, runs: Mapping[str, Run], settings: Serve, name: str | None, spare: int
) -> tuple[Base | None, dict[str, Served]]:
    """Returns a base with those of the `runs` that can be computed beside it, and itself by `name`, if it has one.

    None of them, and no base, if there would be no run beside it and no place is `spare`.
    """
    _, config = read_config(held[0])
    saved = {name: (run.method(), run.delta()) for name, run in runs.items()}
    alone = {name: deltas_beside(config, method, held[1], delta) for name, (method, delta) in saved.items()}
    if not any(alone.values()) and not spare:
        return None, {}
    base = Base(held, settings)
    found = {
        name: affine_maps(base.model, deltas, *saved[name]) for name, deltas in alone.items() if deltas is not None
    }
    maps = {name: one for name, one in found.items() if one is not None}
    if not maps and not spare:
        return None, {}
    base.begin(list(maps.values()), spare)
    served = {}
    for number, one in enumerate(maps, 1):
        runs[one].check_base(base.folder)
        served[one] = Served(base.loaded(runs[one]), base.batch, number)
    if name is not None:
        served[name] = Served(base.alone(), base.batch)
    return base, served
