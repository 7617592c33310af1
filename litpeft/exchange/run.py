"""The result of a run, written and read again: delta.json with a delta, or with a whole model."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft import __version__
from litpeft.core.checksums import file_sha256, read_header
from litpeft.core.distributed import gather
from litpeft.core.errors import ConfigError, ModelError, NumericError, some
from litpeft.core.folders import atomic_folder, checkpoint_steps
from litpeft.core.json import jsonable, read_json, write_json
from litpeft.core.precision import PRECISIONS
from litpeft.core.recognise import refuse_file, refuse_other
from litpeft.core.safetensors import Weights, copy_companions, save_tensors, write_safetensors
from litpeft.core.terminal import command_line, tell
from litpeft.core.typed import typed
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.identity import checksum, config_changes, config_identity, tokenizer_changes, tokenizer_identity
from litpeft.exchange.record import DELTA, FORMAT, NOT_OURS, read_record
from litpeft.methods import METHODS, method_class
from litpeft.model.added_tokens import describe, note_tokens
from litpeft.model.build import build
from litpeft.model.delta import Method, delta_state, load_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage

BACK = "put the folder's files back as they were then, or name the right folder with --base"


@dataclass
class Run:
    """The result of a run on disk: the folder with delta.json and delta.safetensors, or with a model's files."""

    folder: Path
    facts: dict[str, Any]  # delta.json

    @property
    def is_model(self) -> bool:
        """Whether the folder is an ordinary model, since the method trained the base's own weights."""
        return self.facts["holds"] == "model"

    @property
    def storage(self) -> Storage | None:
        """How the base was quantised while the delta was trained; None: not at all."""
        saved = self.facts["base"]["storage"]
        return None if saved is None else Storage(**saved)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights while the delta was trained, dequantised if they were quantised."""
        return PRECISIONS[self.facts["precision"]].weights

    @property
    def template(self) -> str:
        return self.facts["template"]["name"]

    @property
    def system(self) -> str | None:
        return self.facts["template"]["system"]

    def method(self, changes: Mapping[str, Any] | None = None) -> Method:
        """Returns the method with the settings of the run, but for `changes`, as --method gives them."""
        cls, changes = method_class(self.facts["method"]), dict(changes or {})
        for key in changes.keys() - set(cls.at_answers):
            allowed = ", ".join(cls.at_answers) or "none"
            what = f"{key[:40]} stays as it was in training; keys of {self.facts['method']} that may change: {allowed}"
            raise ConfigError(what, where="method")
        method = typed(cls, self.facts["settings"], "settings")
        if not changes:
            return method
        try:
            return typed(cls, jsonable(asdict(method)) | changes, "method")
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def delta(self) -> dict[str, Tensor]:
        """Returns the saved tensors, after checking their file."""
        self.check_files()
        return load_file(self.folder / DELTA)

    def check_files(self) -> None:
        """Raises unless the files of tensors are those that the run wrote."""
        if self.is_model and self.facts["files"].keys() != (held := Weights(self.folder).headers.keys()):
            odd = some(sorted(self.facts["files"].keys() ^ held))
            what = f"the weights are not in the files that the run wrote: delta.json and the folder differ in {odd}"
            raise ModelError(what, where=self.folder)
        for name, sha256 in self.facts["files"].items():
            path = self.folder / name
            read_header(path)
            if file_sha256(path) != sha256:
                what = "the file is not the one that the run wrote (sha256 mismatch with delta.json)"
                raise ModelError(what, where=path)

    def model_folder(self) -> Path:
        """Returns the folder of a run that is a model, after checking its weights and config."""
        self.check_config(self.folder)
        self.check_files()
        return self.folder

    def base_folder(self, moved_to: str | None = None) -> Path:
        """Returns the base model's folder, after checking that its weights and config are those of the training."""
        saved = self.facts["base"]
        folder = Path(moved_to) if moved_to else Path(saved["path"])
        if not os.path.isdir(folder):  # Path.is_dir would raise for a name that is too long
            hint = "say where it is with --base FOLDER"
            raise ModelError(f"the run's base model is not at {folder}", where=self.folder, hint=hint)
        refuse_other(folder)
        self.check_config(folder)
        fingerprint = Weights(folder).fingerprint()
        if fingerprint != saved["fingerprint"]:
            prints = f"{folder} has fingerprint {fingerprint[:12]}, the run's base {saved['fingerprint'][:12]}"
            what = f"the run was trained on other weights: {prints}"
            raise ModelError(what, where=self.folder, hint="say where the right base is with --base")
        return folder

    def check_config(self, folder: Path) -> None:
        """Raises unless the model's config is that of the training; format 2 does not record it."""
        then = self.facts["base"].get("config")
        if then is not None and (lines := config_changes(then, config_identity(folder))):
            what = f"the model's config is not the one that the run was trained with: {some(lines, '; ')}"
            raise ModelError(what, where=folder / "config.json", hint=BACK)

    def tokenizer_and_template(self, folder: Path) -> tuple[Tokenizer, ChatTemplate]:
        """Returns tokenizer and template of the model's folder, after checking that they are those of the training."""
        tokenizer = Tokenizer.load(folder)
        tokenizer.add(self.facts["settings"].get("add_tokens", ()))
        if self.template == "model" and tokenizer.template_hash != self.facts["template"]["sha256"]:
            what = "the base's chat template is not the one that the run was trained with"
            raise ModelError(what, where=folder, hint=BACK)
        template = ChatTemplate(tokenizer, self.template, is_setting=False)
        then = self.facts["base"].get("tokenizer")
        if then is not None and (lines := tokenizer_changes(then, tokenizer_identity(template))):
            what = f"the tokenizer is not the one that the run was trained with: {'; '.join(lines)}"
            raise ModelError(what, where=folder, hint=BACK)
        return tokenizer, template

    def progress(self) -> str | None:
        """Returns a line with the step of the result and how to resume the run; None if the run is complete."""
        facts, run = self.facts, self.folder.parent if self.folder.name == "final" else self.folder
        step, planned, finished = facts["step"], facts.get("steps_planned"), facts["finished"]
        newest = max(checkpoint_steps(run / "checkpoints"), default=0)
        if planned is None and finished and (run / "report.md").exists():
            newest = 0  # format 2 does not record how far a run got beyond its best step
        newer = newest > facts.get("steps_done", step)
        if finished and not newer and planned in (None, step):
            return None
        said = [f"{self.folder} holds step {step:,}" + (f" of {planned:,}" if planned else "")]
        said += [] if finished else ["the run was stopped"]
        said += [f"there is a newer checkpoint, of step {newest:,}"] if newer else []
        if (newer or not finished) and (run / "run.yaml").exists():  # final/ may have been copied alone
            said.append(f"it goes on with: {resume_command(facts['method'], run)}")
        return "; ".join(said)


def find_run(path: Path) -> Run | None:
    """Returns the run at `path` (a run's folder or its final/), or None if `path` is a model folder."""
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
    refuse_other(path)
    read_json(path / "config.json", "config.json of a model")
    return None


def tell_progress(run: Run | None) -> None:
    """Tells the user if a result is not that of a complete run."""
    if run is not None and (progress := run.progress()):
        tell(progress)


def resume_command(method: str, run: Path) -> str:
    """Returns the command that resumes a run."""
    return command_line("finetune", method, "--config", run / "run.yaml", "--out", run, "--resume")


def method_of(run: Path) -> str | None:
    """Returns the method of a run without a result, from the command in the first line of its run.yaml."""
    with open(run / "run.yaml", encoding="utf-8", errors="replace") as file:
        said = re.match(r"# litpeft finetune (\w+) ", file.readline(200))
    return said[1] if said and said[1] in METHODS else None


def save_result(
    folder: Path, model: GPT, method: str, settings: Method, base: Path, facts: dict[str, Any], first: bool = True
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
            write_stop_ids(temporary, facts["base"]["tokenizer"]["stop_ids"])
        else:
            save_tensors(dict(_finite(tensors, folder)), temporary / DELTA)
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
    """Writes the weights' dtype into config.json, under its new and its old key, and what the method adds."""
    path = folder / "config.json"
    config = read_json(path, "config.json of the base")
    if method is not None:
        describe(config, method)
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
