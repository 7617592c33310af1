"""`init_from`: a run that begins with what another run, or an adapter of peft, has learned."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from litpeft.core.checksums import file_sha256
from litpeft.core.errors import ConfigError, ModelError, some
from litpeft.core.json import jsonable
from litpeft.core.terminal import say
from litpeft.core.typed import typed
from litpeft.exchange.identity import tokenizer_changes
from litpeft.exchange.run import Run, find_run, tell_progress
from litpeft.methods import METHODS, method_class
from litpeft.model.delta import Method, misfits
from litpeft.model.gpt import GPT
from litpeft.train.checkpoints import Checkpoint
from litpeft.train.settings import Base, Finetune

KEY = "init_from"
SHOWN = 60  # characters of a value that is taken over


@dataclass
class Init:
    """What a run begins with."""

    run: Run
    method: Method  # of the new run: the settings that decide what the tensors mean are those of `run`
    delta: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, str]:
        """Returns what the new run records of it."""
        return {"path": str(self.run.place.resolve()), "fingerprint": file_sha256(self.run.learned_file)}

    def check(self, model: GPT, tokenizer: dict[str, Any]) -> None:
        """Raises unless the tensors fit the model, and the tokenizer (its identity) is the one they were trained with.

        `model` has shapes only.
        """
        if wrong := misfits(model, self.delta):
            what = f"{self.run.folder} does not fit this model: {some(wrong, '; ')}"
            raise ConfigError(what, where=KEY, hint="name another run, or begin without")
        then = self.run.facts["base"].get("tokenizer")
        if then is not None and (lines := tokenizer_changes(then, tokenizer)):
            what = f"the tokenizer is not the one that {self.run.place} was trained with: {'; '.join(lines)}"
            raise ConfigError(what, where=KEY, hint="put the base's files back as they were then")


def read_init(settings: Finetune, method: Method) -> Init | None:
    """Returns what a new run begins with, None where `init_from` is not set; an error says what does not fit."""
    if settings.init_from is None:
        return None
    run = find_run(Path(settings.init_from))
    if run is None or run.is_model:
        folder = settings.init_from if run is None else run.folder
        what = f"{folder} is a whole model, not what was learned beside one"
        raise ConfigError(what, where=KEY, hint=f"begin from it as a base: --base.dir {folder}, without {KEY}")
    tell_progress(run)
    try:
        run.base_folder(settings.base.dir)
    except ModelError as error:
        error.hint = f"{KEY} goes on from what was learned on one base: set base.dir to that"
        raise
    theirs = run.method()
    if type(theirs) is not type(method):
        name = _name(theirs) if run.facts["method"] not in METHODS else run.facts["method"]
        what = f"{run.place} is of the method {name}, this run of another"
        raise ConfigError(what, where=KEY, hint=f"say `finetune {name}`; `combine` turns runs into one of lora")
    _check_storage(run, settings.base, theirs)
    mine = adopted(method, theirs, str(run.place))
    delta = run.delta()
    mine.restore(delta)
    taken = {key: value for key, value in _values(mine).items() if value != _values(method)[key]}
    shown = (f"method.{key} {_shown(value)}" for key, value in taken.items())
    say(f"begins from  {run.place}" + (f", with its {', '.join(shown)}" if taken else ""))
    return Init(run, mine, delta)


def of_checkpoint(settings: Finetune, method: Method, saved: Checkpoint) -> Method:
    """Returns the method of a run that is resumed: what it took over when it began is in its checkpoint."""
    facts = saved.facts
    if settings.init_from is None or not facts.get(KEY) or type(method) is not method_class(facts["method"]):
        return method
    theirs = typed(type(method), facts["settings"]["method"], "settings.method")
    return adopted(method, theirs, facts[KEY]["path"])


def adopted(method: Method, theirs: Method, place: str) -> Method:
    """Returns the method with the other's settings where it has defaults; an error names one that is neither.

    Those in `training_only` stay as they are.
    """
    mine, default, wanted = _values(method), _values(type(method)()), _values(theirs)
    keys = [key for key in mine if key not in method.training_only and mine[key] != wanted[key]]
    if wrong := [key for key in keys if mine[key] != default[key]]:
        pairs = (f"method.{key} is {_shown(mine[key])} here and {_shown(wanted[key])} there" for key in wrong)
        what = f"{place} was trained with other settings: {'; '.join(pairs)}"
        hint = f"leave {', '.join(f'method.{key}' for key in wrong)} out: what is not given is taken from there"
        raise ConfigError(what, where=f"method.{wrong[0]}", hint=hint)
    return replace(method, **{key: getattr(theirs, key) for key in keys})


def _check_storage(run: Run, base: Base, method: Method) -> None:
    """Raises if the base is held in other codes than in the run and its method started from those; else says so."""
    if "fingerprint" not in run.facts["base"]:  # an adapter of peft does not say
        return
    then, now = run.storage, None if base.quantize is None else (base.quantize, base.double_quantize)
    if (then and (then.name, then.double_quantize)) == now:
        return
    was, held = ("not quantised" if name is None else f"in {name}" for name in (then and then.name, base.quantize))
    if method.defines("start") or method.defines("choose"):
        keys = f"--base.quantize {then.name if then else 'null'}"
        keys += f" --base.double_quantize {str(then.double_quantize).lower()}" if then else ""
        what = f"{run.place} is of a method whose start depends on the weights: they were {was}, and here are {held}"
        raise ConfigError(what, where="base.quantize", hint=f"say {keys}")
    say(f"{run.place} was trained on a base that was {was}; here it is {held}, so the start is not quite its end")


def _name(method: Method) -> str:
    return next(name for name in METHODS if method_class(name) is type(method))


def _values(method: Method) -> dict[str, Any]:
    values = asdict(method)
    return {field.name: jsonable(values[field.name]) for field in fields(method)}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
