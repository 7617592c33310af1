"""Fetches files of data sets into the cache of huggingface_hub, verified; what was fetched is used without a network.

Beside the cache stands what the hub listed, one small file for each revision that was asked for: HF_HOME/litpeft.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, WeakFileLock

from litpeft.core.errors import ConfigError, DataError, UserError, counted, scaled
from litpeft.core.folders import atomic_file
from litpeft.core.hub import NO_ANSWER, HubFile, Repository, difference, no_hub, transfer, tree
from litpeft.core.place import check_disk, disk_fault
from litpeft.core.terminal import is_first, tell
from litpeft.data.hub.address import CONVERTED, Address
from litpeft.data.hub.layout import Parts, card_configs, matches, parts_of, rows_files

CARD = "README.md"
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """A commit of a data set, and its files."""

    name: str
    commit: str
    files: dict[str, HubFile]

    @property
    def folder(self) -> Path:
        """The folder of the commit in the cache."""
        cached = repo_folder_name(repo_id=self.name, repo_type="dataset")
        return Path(constants.HF_HUB_CACHE) / cached / "snapshots" / self.commit

    def fetch(self, names: list[str]) -> list[Path]:
        """Returns the paths of files; those that the cache lacks, or has otherwise than listed, are fetched."""
        repo = Repository(self.name, self.commit, "dataset")
        if not self.pending(names):
            return [self.folder / name for name in names]
        lock = _kept(self.name, self.commit).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the ranks of a run fetch the same files: the first of them does
            pending = self.pending(names)
            size = sum(file.size for file in pending.values())
            check_disk(self.folder, size, "the files", "free some space, or set HF_HOME to a folder of another disk")
            if list(pending) not in ([], [CARD]):
                tell(f"will fetch {counted(len(pending), 'file')}, {scaled(size, 'B')}, of {self.name}@{self.commit}")
            try:
                if pending:
                    transfer(repo, self.commit, self.folder, pending, cache=True)
            except OSError as error:
                raise (disk_fault(error, self.folder) or error) from None
        return [self.folder / name for name in names]

    def pending(self, names: list[str]) -> dict[str, HubFile]:
        """Returns those of the files that the cache lacks, or has otherwise than listed."""
        return {name: self.files[name] for name in names if _differs(self.folder / name, self.files[name])}

    def card(self) -> bytes:
        """Returns README.md, empty if there is none."""
        return self.fetch([CARD])[0].read_bytes() if CARD in self.files else b""

    def remember(self, *revisions: str | None) -> None:
        """Keeps the listing for use without a network, under each of these names and the commit's."""
        text = json.dumps({"commit": self.commit, "files": {name: asdict(file) for name, file in self.files.items()}})
        for revision in (*revisions, self.commit):
            path = _kept(self.name, revision)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                with atomic_file(path) as handle:
                    handle.write(text)


@dataclass(frozen=True)
class Found:
    """What an address means now: the commit of its repository, and the files of it that are meant."""

    address: Address  # with the commit as its revision
    listing: Listing
    parts: Parts
    asked: str | None  # the revision that was asked for

    def fetch(self, names: list[str]) -> list[Path]:
        """Returns the paths of files, and remembers the listing that they were verified against."""
        paths = self.listing.fetch(names)
        self.listing.remember(self.asked)
        return paths


def look_up(address: Address) -> Found:
    """Returns what an address means."""
    listing = listing_of(_repository(address))
    card = listing.card()
    if _is_scripted(address, listing, card):
        listing, card = _converted(address, listing), b""
    pinned = replace(address, revision=listing.commit)
    return Found(pinned, listing, parts_of(address, listing.files, card), address.revision)


def _differs(path: Path, file: HubFile) -> bool:
    return not path.is_file() or _differed(path, file, path.stat().st_mtime_ns)


@cache
def _differed(path: Path, file: HubFile, changed_at: int) -> bool:
    """Returns whether a file that was last changed then is another one: its hash is taken once in a process."""
    return bool(difference(path, file))


def _repository(address: Address) -> Repository:
    return Repository(address.name, address.revision, "dataset")


def _is_scripted(address: Address, listing: Listing, card: bytes) -> bool:
    """Returns whether a Python script of the repository makes the rows, and the address names no file."""
    script = f"{address.name.split('/')[1]}.py"
    named = any(matches(file, address.rest or "") for file in rows_files(listing.files))
    return script in listing.files and not card_configs(card) and not named


def _converted(address: Address, listing: Listing) -> Listing:
    """Returns the Parquet copy that the hub made of rows that a script makes; raises if there is none."""
    script = f"{address.name.split('/')[1]}.py"
    try:
        return listing_of(_repository(replace(address, revision=CONVERTED)))
    except DataError:
        what = f"its rows come from a Python script, {script}, which litpeft does not run"
        files = rows_files(listing.files)
        hint = "look for a copy of the set that holds files"
        if files:
            hint = f"name a file of it: {address.part(files[0])}"
        raise DataError(f"{what}, and the hub has no Parquet copy of them", where=address, hint=hint) from None


@cache
def listing_of(repo: Repository) -> Listing:
    """Returns the listing of a revision: the hub's, or without a network the one that was fetched last.

    The hub is asked once in a process, so that a run sees one commit.
    """
    kept = _read(repo)
    if kept and COMMIT.fullmatch(repo.revision or ""):
        return kept
    try:
        commit, files = tree(repo, below=True)
    except HFValidationError as error:
        raise ConfigError(f"{repo.name!r} is no name of the hub: {error}", where="data.path") from None
    except NO_ANSWER as error:
        failure: UserError = no_hub(error, repo)
        if kept is None:
            raise failure from None
        if is_first():
            tell(f"{failure.what}; taking {repo.name}@{kept.commit}, which was fetched before")
        return kept
    return Listing(repo.name, str(commit), files)


def _read(repo: Repository) -> Listing | None:
    path = _kept(repo.name, repo.revision)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {name: HubFile(**file) for name, file in record["files"].items()}
        return Listing(repo.name, record["commit"], files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or not ours: ask the hub
        return None


def _kept(name: str, revision: str | None) -> Path:
    """Returns the file of a listing."""
    return Path(constants.HF_HOME) / "litpeft" / name / f"{quote(revision or 'main', safe='')}.json"
