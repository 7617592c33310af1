"""The result of a run, written and read again: delta.json with a delta, or with a whole model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft import __version__
from litpeft.core.checksums import file_sha256
from litpeft.core.distributed import gather
from litpeft.core.errors import ConfigError, ModelError, NumericError
from litpeft.core.exports import CannotExport
from litpeft.core.folders import OUTDATED, atomic_folder, checkpoint_steps, is_outdated
from litpeft.core.json import read_json, write_json
from litpeft.core.recognise import is_peft, refuse_file, refuse_other
from litpeft.core.safetensors import copy_companions, save_tensors, write_safetensors
from litpeft.core.terminal import command_line, tell
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.chat_template import write_template
from litpeft.exchange.exports.peft import write_adapter
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.identity import checksum
from litpeft.exchange.imports.peft import PeftRun
from litpeft.exchange.record import DELTA, FORMAT, NOT_OURS, read_record
from litpeft.exchange.result import Run, resume_command
from litpeft.methods import METHODS
from litpeft.model.added_tokens import describe, note_tokens
from litpeft.model.build import build
from litpeft.model.delta import Method, delta_state, load_delta
from litpeft.model.families import family
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.rope import spell_twice


def find_run(path: Path) -> Run | None:
    """Returns the run at `path` (a run's folder, its final/, or an adapter of peft), or None for a model folder."""
    refuse_file(path)
    for folder in (path / "final", path):
        if (folder / "delta.json").exists():
            return Run(folder, read_record(folder / "delta.json"))
    if (path / "run.yaml").exists():
        steps, method = checkpoint_steps(path / "checkpoints"), method_of(path)
        hint = "it did not finish; train it again"
        if steps and method:
            hint = f"it was stopped after its checkpoint of step {steps[-1]:,}; "
            hint += f"it goes on with: {resume_command(method, path)}"
        raise ModelError("this run holds no result (no final/delta.json)", where=path, hint=hint)
    if is_peft(path) and not any(path.glob("model*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        return PeftRun.read(path)
    refuse_other(path)
    read_json(path / "config.json", "config.json of a model")
    return None


def tell_outdated(folder: Path) -> None:
    """Tells the user if a folder was made of an earlier state of the run that it lies in."""
    if is_outdated(folder):
        words = ["merge", folder.parent] if folder.name == "merged" else ["convert", folder.parent, "--to", folder.name]
        tell(f"warning: {folder}: {OUTDATED}; `{command_line(*words, '--overwrite')}` makes it anew")


def tell_progress(run: Run | None) -> None:
    """Tells the user if a result is not that of a complete run."""
    if run is not None and (progress := run.progress()):
        tell(progress)


def method_of(run: Path) -> str | None:
    """Returns the method of a run without a result, from the command in the first line of its run.yaml."""
    with open(run / "run.yaml", encoding="utf-8", errors="replace") as file:
        said = re.match(r"# litpeft finetune (\w+) ", file.readline(200))
    return said[1] if said and said[1] in METHODS else None


def save_result(
    folder: Path,
    model: GPT,
    method: str,
    settings: Method,
    base: Path,
    facts: dict[str, Any],
    first: bool = True,
    template: ChatTemplate | None = None,
) -> None:
    """Writes the result of a run; the folder appears complete or not at all.

    Every rank must call it, since tensors are gathered; the first one writes.
    """
    if settings.writes_model:
        dtype = settings.result_dtype(model.dtype)
        own = ((name, gather(tensor).to("cpu", dtype)) for name, tensor in model.state_dict().items())
        tensors = NameMap(*read_config(base)).written(own, where=str(base))
    else:
        tensors = ((name, gather(tensor).cpu()) for name, tensor in delta_state(model).items())
        if first:
            with torch.no_grad():
                settings, held = settings.result(model, dict(tensors))
            tensors = held.items()
    if not first:
        for _ in tensors:
            pass
        return
    with atomic_folder(folder, overwrite=True) as temporary:
        if settings.writes_model:
            write_safetensors(temporary, _finite(tensors, folder))
            copy_companions(base, temporary)
            write_config(temporary, dtype, settings)
            if template is not None:
                write_template(temporary, template)
            write_stop_ids(temporary, facts["base"]["tokenizer"]["stop_ids"])
        else:
            delta = dict(_finite(tensors, folder))
            save_tensors(delta, temporary / DELTA)
            held, size = facts["base"]["storage"], sum(path.stat().st_size for path in base.glob("*.safetensors"))
            most = max(4 * (temporary / DELTA).stat().st_size, size / 20)
            with suppress(CannotExport):  # then `convert --to peft` says why
                write_adapter(temporary, settings, None if held is None else Storage(**held), delta, base, most)
        record = {
            "format": FORMAT,
            "litpeft": __version__,
            "holds": "model" if settings.writes_model else "delta",
            "method": method,
            "settings": asdict(settings),
            "files": {path.name: file_sha256(path) for path in sorted(temporary.glob("*.safetensors"))},
            **facts,
        }
        write_json(temporary / "delta.json", record | {"checksum": checksum(record)})


def _finite(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise NumericError(f"{name} is not finite: nothing was saved", where=folder)
        yield name, tensor


def write_config(folder: Path, dtype: torch.dtype, method: Method | None = None) -> None:
    """Writes dtype and rotary settings into config.json, under new and old keys, and what the method adds."""
    path = folder / "config.json"
    config = read_json(path, "config.json of the base")
    if method is not None:
        describe(config, method)
    if config.get("quantization_config") is not None:  # what is written is plain
        del config["quantization_config"]
    spell_twice(config, getattr(family(config["model_type"]), "ROPE_NAMES", {}))
    name = str(dtype).removeprefix("torch.")
    write_json(path, config | {"dtype": name, "torch_dtype": name})


def base_facts(
    base: Path, storage: Storage | None, fingerprint: str, config: dict[str, Any], tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """Returns delta.json's entry for the base: its path, weights and storage, and what identity.py takes from it."""
    held = None if storage is None else {"name": storage.name, "double_quantize": storage.double_quantize}
    weights = {"path": str(base.resolve()), "fingerprint": fingerprint, "storage": held}
    return weights | {"config": config, "tokenizer": tokenizer}


def build_run(
    run: Run,
    base: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    storage: Storage | None = None,
    changes: Mapping[str, Any] | None = None,
) -> GPT:
    """Returns the base model with the run's delta; with `changes` of its method, what then has no place is left out."""
    delta, method = run.delta(), run.method(changes)
    if method.add_tokens:
        note_tokens(method, Tokenizer.load(base))
    try:
        model = build(base, dtype, method, device, storage, delta=delta)
    except ConfigError as error:
        if changes:
            raise
        if storage is None and run.storage is not None:  # as `merge --onto original` wants it
            what = f"what was learned belongs to weights in {run.storage.name}, not to others: {error.what}"
            raise ConfigError(what, where="onto", hint="leave it out") from None
        what = f"{error.where.replace('method', 'settings', 1)}: {error.what}"  # the settings come from delta.json
        raise ModelError(what, where=run.folder / "delta.json", hint=NOT_OURS) from None
    delta = {name: delta[name] for name in delta.keys() & model.delta_keys} if changes else delta
    load_delta(model, delta, str(run.folder))
    return model
