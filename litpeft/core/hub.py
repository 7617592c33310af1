"""The Hugging Face hub: what a repository holds, and transfers that are resumed and verified.

huggingface_hub takes the token from the environment or the saved login.
"""

import glob
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging

from litpeft.core.checksums import file_sha256
from litpeft.core.errors import DataError, ModelError, ResourceError, UserError
from litpeft.core.place import disk_fault
from litpeft.core.terminal import tell

NO_ANSWER = (errors.HTTPError, OSError, ValueError, KeyError)  # the last two: the server is not a hub
ATTEMPTS = 5  # of the whole transfer; within each huggingface_hub retries a file a few times


@dataclass(frozen=True)
class Repository:
    """A repository, and which revision of it is meant; None: its main branch."""

    name: str  # org/name
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    @property
    def noun(self) -> str:
        return "data set" if self.kind == "dataset" else "model"


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it: a large one with its SHA-256, a small one with its git blob id."""

    size: int  # bytes
    sha256: str | None
    git_id: str


def tree(repo: Repository, below: bool = False) -> tuple[str | None, dict[str, HubFile]]:
    """Returns the commit and the files at the top level, with `below` those of folders too.

    Raises a UserError where the hub refuses it for good, else one of NO_ANSWER.
    """
    logging.set_verbosity_error()  # its warnings print signed URLs, and what they report is told here
    api = HfApi()
    try:
        commit = api.repo_info(repo.name, revision=repo.revision, repo_type=repo.kind).sha
        entries = api.list_repo_tree(repo.name, revision=commit, repo_type=repo.kind, recursive=below)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
    except NO_ANSWER as error:
        if found := refusal(error, repo):
            raise found from None
        raise
    return commit, {file.path: HubFile(file.size, file.lfs and file.lfs.sha256, file.blob_id) for file in files}


def difference(path: Path, file: HubFile) -> str:
    """Returns how a file on disk differs from the hub's; "" if it is the same."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != file.size:
        return f"{path.stat().st_size} bytes of {file.size}"
    if file.sha256:
        kind, listed, found = "sha256", file.sha256, file_sha256(path)
    else:
        blob = b"blob %d\0" % file.size + path.read_bytes()
        kind, listed, found = "git id", file.git_id, hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    return "" if found == listed else f"{kind} {found[:12]} is not {listed[:12]}"


def transfer(repo: Repository, commit: str | None, folder: Path, pending: dict[str, HubFile], cache: bool) -> None:
    """Downloads `pending` and verifies it; retries a few times after a broken transfer, and keeps complete files.

    `folder` gets the files themselves; with `cache` it is the commit's folder in the cache of huggingface_hub.
    """
    where: dict[str, Any] = {} if cache else {"local_dir": folder}
    missing = list(pending)
    for attempt in range(1, ATTEMPTS + 1):
        fault: Exception = ConnectionError("the hub stopped answering")
        try:
            for name in missing:
                remove(folder / name)  # else huggingface_hub may keep the old file
            named = [glob.escape(name) for name in missing]
            snapshot_download(repo.name, repo_type=repo.kind, revision=commit, allow_patterns=named, **where)
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # the last two: of hf_xet
            if found := disk_fault(error, folder) or refusal(error, repo):
                raise found from None
            fault = error
        # even without an error: if the hub is gone, snapshot_download may return an incomplete folder
        missing = [name for name in missing if not (folder / name).is_file()]
        if not missing:
            break
        told = f"the transfer broke off ({in_one_line(fault)}); still missing: {', '.join(missing[:3])}"
        if attempt == ATTEMPTS:
            hint = "run the same command again: finished files are kept"
            raise ResourceError(f"{told} after {ATTEMPTS} attempts", where=folder, hint=hint)
        tell(f"{told}: attempt {attempt + 1} of {ATTEMPTS} in {2**attempt} s")
        time.sleep(2**attempt)
    for path, file in ((folder / name, file) for name, file in pending.items()):
        if found := difference(path, file):  # huggingface_hub compares sizes only
            remove(path)
            hint = "the file was deleted: run the same command again; if it stays, do not trust this source"
            raise _at_fault(repo)(f"not what the hub lists: {found}", where=path, hint=hint)


def remove(path: Path) -> None:
    """Removes a file, if it is there; in the cache it is a link to the file."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def in_one_line(error: BaseException) -> str:
    """Returns the error in one line without URLs, which may hold a password or a signature."""
    error = error.__cause__ or error
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"\w+://[^\s']+", "(address)", ": ".join(filter(None, (type(error).__name__, first))))


def refusal(error: Exception, repo: Repository) -> UserError | None:
    """Returns the UserError for a permanent refusal of the hub, None for an error that may be temporary."""
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status, at_fault = error.response.status_code, _at_fault(repo)
    login = "set HF_TOKEN or log in with `hf auth login`"
    if isinstance(error, errors.GatedRepoError):  # first: it is a RepositoryNotFoundError too
        hint = f"accept its terms on the {repo.noun}'s page, then {login} as the same user"
        return at_fault(f"the {repo.noun} is gated and the hub refuses you ({status})", where=repo.name, hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the spelling; for a private repository {login}"
        return at_fault("the hub has no such repository, or it is private", where=repo.name, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "give a branch, a tag or a full commit"
        return at_fault(f"the repository has no revision {repo.revision!r}", where=repo.name, hint=hint)
    if status in (401, 403):
        hint = f"the token in use is not valid or may not read this {repo.noun}: {login} anew, or unset HF_TOKEN"
        return at_fault(f"the hub refuses the request ({status})", where=repo.name, hint=hint)
    return None


def no_hub(error: Exception, repo: Repository) -> ResourceError:
    """Returns the UserError for a hub that does not answer."""
    what = f"cannot reach the hub at {urlsplit(constants.ENDPOINT).hostname} ({in_one_line(error)})"
    hint = "check the network, the proxy variables, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again"
    return ResourceError(what, where=repo.name, hint=hint)


def _at_fault(repo: Repository) -> type[UserError]:
    return DataError if repo.kind == "dataset" else ModelError
