"""The result of a run on disk: delta.json, and a delta or a whole model beside it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.checksums import file_sha256, read_header
from litpeft.core.errors import ConfigError, ModelError, some
from litpeft.core.folders import checkpoint_steps
from litpeft.core.json import jsonable
from litpeft.core.precision import PRECISIONS
from litpeft.core.recognise import refuse_other
from litpeft.core.safetensors import Weights
from litpeft.core.terminal import command_line
from litpeft.core.typed import typed
from litpeft.data.settings import Thinking
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import config_changes, config_identity, tokenizer_changes, tokenizer_identity
from litpeft.exchange.record import DELTA
from litpeft.methods import method_class
from litpeft.model.delta import Method
from litpeft.model.quantize import Storage

BACK = "put the folder's files back as they were then, or name the right folder with --base"


@dataclass
class Run:
    """The result of a run on disk: the folder with delta.json and delta.safetensors, or with a model's files."""

    folder: Path
    facts: dict[str, Any]  # delta.json

    @property
    def place(self) -> Path:
        """The folder that the user knows the run by."""
        return self.folder.parent if self.folder.name == "final" else self.folder

    @property
    def tensors(self) -> list[Path]:
        """The files of the result's tensors, without what says the same for another program."""
        return [self.folder / name for name in (self.facts["files"] if self.is_model else (DELTA,))]

    @property
    def learned_file(self) -> Path:
        """The file of what was learned beside the base."""
        return self.folder / DELTA

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
        folder = self.find_base(moved_to)
        self.check_base(folder)
        return folder

    def find_base(self, moved_to: str | None = None) -> Path:
        """Returns the base model's folder, whose config is that of the training; begins what `check_base` compares."""
        saved = self.facts["base"]
        folder = Path(moved_to) if moved_to else Path(saved["path"])
        if not os.path.isdir(folder):  # Path.is_dir would raise for a name that is too long
            hint = "say where it is with --base FOLDER"
            raise ModelError(f"the run's base model is not at {folder}", where=self.folder, hint=hint)
        refuse_other(folder)
        self.check_config(folder)
        Weights(folder).begin_sums()
        return folder

    def check_base(self, folder: Path) -> None:
        """Raises unless the weights of a folder are those of the training."""
        fingerprint, known = Weights(folder).fingerprint(), self.facts["base"]["fingerprint"]
        if fingerprint != known:
            prints = f"{folder} has fingerprint {fingerprint[:12]}, the run's base {known[:12]}"
            what = f"the run was trained on other weights: {prints}"
            raise ModelError(what, where=self.folder, hint="say where the right base is with --base")

    def check_config(self, folder: Path) -> None:
        """Raises unless the model's config is that of the training; format 2 does not record it."""
        then = self.facts["base"].get("config")
        if then is not None and (lines := config_changes(then, config_identity(folder))):
            what = f"the model's config is not the one that the run was trained with: {some(lines, '; ')}"
            raise ModelError(what, where=folder / "config.json", hint=BACK)

    @property
    def thinking(self) -> Thinking:
        """What was done with thoughts that the template leaves out."""
        return self.facts["template"].get("thinking", "error")

    def tokenizer_and_template(
        self, folder: Path, options: Mapping[str, Any] | None = None
    ) -> tuple[Tokenizer, ChatTemplate]:
        """Returns tokenizer and template of the model's folder, after checking that they are those of the training.

        `options` are told to the template beside those of the training.
        """
        tokenizer = Tokenizer.load(folder)
        tokenizer.add(self.facts["settings"].get("add_tokens", ()))
        saved = self.facts["template"]
        if self.template == "model" and tokenizer.template_hash not in (saved["sha256"], saved.get("text_sha256")):
            what = "the base's chat template is not the one that the run was trained with"
            raise ModelError(what, where=folder, hint=BACK)
        trained = ChatTemplate(tokenizer, self.template, options=saved.get("options"), is_setting=False)
        if saved.get("text_sha256") not in (None, trained.exported_hash):
            what = f"the run was trained with another text of the template {self.template}"
            raise ModelError(what, where=folder, hint="take the version of litpeft that trained it")
        template = trained
        if options:
            template = ChatTemplate(tokenizer, self.template, options=trained.options | dict(options), is_setting=False)
        then = self.facts["base"].get("tokenizer")
        if then is not None and (lines := tokenizer_changes(then, tokenizer_identity(template))):
            what = f"the tokenizer is not the one that the run was trained with: {'; '.join(lines)}"
            raise ModelError(what, where=folder, hint=BACK)
        return tokenizer, template

    def texts(self, base: Path) -> Path:
        """Returns the folder that holds the tokenizer and the template of the training."""
        return base

    def progress(self) -> str | None:
        """Returns a line with the step of the result and how to resume the run; None if the run is complete."""
        facts, run = self.facts, self.place
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


def resume_command(method: str, run: Path) -> str:
    """Returns the command that resumes a run."""
    return command_line("finetune", method, "--config", run / "run.yaml", "--out", run, "--resume")
