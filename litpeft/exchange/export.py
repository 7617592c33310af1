"""`litpeft convert SOURCE --to FORMAT`: writes a model or run for another program, and reads it back."""

from importlib import import_module
from pathlib import Path

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.exports import EXPORTS, CannotExport
from litpeft.core.folders import atomic_folder, locked, refuse_existing
from litpeft.core.place import check_place
from litpeft.core.terminal import command_line, say
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.compare import FOLD_TOLERANCE, PROMPTS, in_float32, logits_of
from litpeft.exchange.exports.low_rank import wanted
from litpeft.exchange.push import check_repo, push, write_card
from litpeft.exchange.result import Run
from litpeft.exchange.run import build_run, find_run, tell_progress
from litpeft.exchange.settings import Convert
from litpeft.model.fold import unfoldable
from litpeft.model.slots import Linear


def export(settings: Convert) -> None:
    """Writes the folder, if what is read back from it computes the same as the source."""
    name, _, function = EXPORTS[settings.to].write.partition(":")
    module = import_module(name)
    write = getattr(module, function)
    if EXPORTS[settings.to].of_models:
        return write(settings)
    source = Path(settings.source)
    run = find_run(source)
    if run is None or run.is_model:
        of = f"{settings.to} is for what a run learned beside its base"
        if run is None:
            what, hint = f"this is a model folder, and {of}", "name the run: the `--out` of `litpeft finetune`"
        else:
            what = f"this run trained the model itself, and {of}"
            hint = f"{run.folder} is an ordinary Hugging Face folder; `--to gguf` makes a file for llama.cpp of it"
        raise ConfigError(what, where=source, hint=hint)
    out = Path(settings.out) if settings.out else run.place / settings.to
    check_place(out)
    check_repo(settings.push)
    refuse_existing(out, settings.overwrite)
    tell_progress(run)
    base = run.base_folder(settings.base)
    for kept in (base, run.folder):
        if kept.resolve().is_relative_to(out.resolve()):
            what = f"it would replace {kept}, from which it is made"
            raise ConfigError(what, where="out", hint="name another folder")
    with locked(out), atomic_folder(out, settings.overwrite) as folder:
        try:
            said = write(folder, run, base)
        except CannotExport as error:
            what = f"this run is nothing that {settings.to} has: {error}"
            more = ["--base", settings.base] if settings.base else []
            raise ModelError(what, where=source, hint=another_way(run, base, settings.to, more)) from None
        if settings.push:
            write_card(folder, settings.push, base, run, f"An adapter ({settings.to})")
        if settings.no_verify:
            say("not checked, as --no_verify wants it: the logits of base and adapter with those of the run")
        else:
            say(getattr(module, "verify", read_as_run)(folder, run, base))
    say(f"wrote {out}: {said}")
    if settings.push:
        push(out, settings.push)


def read_as_run(folder: Path, run: Run, base: Path) -> str:
    """Reads an adapter back that is a run for litpeft; raises unless it computes what the run does."""
    prompts = [Tokenizer.load(base).encode(text) for text in PROMPTS]
    want, dtype = wanted(run, base, prompts)
    back = find_run(folder)
    back.base_folder(str(base))
    got = logits_of(in_float32(build_run(back, base, dtype, storage=run.storage)), prompts)
    off = float((got - want).abs().max() / want.abs().max())
    if not off <= FOLD_TOLERANCE:
        what = f"logits of the files, read back, are off by {off:.1e} of the largest: nothing was written"
        raise ModelError(what, where=run.place)
    return f"read back: logits at {len(want)} positions differ by {off:.1e} of the largest"


def another_way(run: Run, base: Path, to: str, more: list[str]) -> str:
    """Returns the command that makes something of a run which a format has no kind for; `more` are its other words."""
    model, place = build_run(run, base, run.dtype, storage=run.storage), run.place
    if unfoldable(model):
        return f"generate and chat take the run as it is: {command_line('chat', place, *more)}"
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    other = model.base_values.keys() - {f"{name}.weight" for name in layers}
    shifts = (layer.slot.frozen(layer).shift for layer in layers.values() if layer.slot.deltas)
    if other or run.method().add_tokens or any(shift is not None for shift in shifts):
        return f"`{command_line('merge', place, *more)}` makes a model of it"
    lora = place.with_name(f"{place.name}-as-lora")
    made = f"`{command_line('combine', place, lora, '--rank', 16, *more)}` makes a LoRA of it"
    return f"{made} and says how much it keeps; then `{command_line('convert', lora, '--to', to, *more)}`"
