"""Folders and files that appear complete or not at all, locks, and clean-up after killed processes."""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TextIO

from litpeft.core.checksums import CHECKSUMS
from litpeft.core.errors import ConfigError, ResourceError, some
from litpeft.core.exports import EXPORTS
from litpeft.core.place import FULL, disk_fault

# the files of a model beside its weights, copied from folder to folder
COMPANIONS = (
    "config.json",  # what follows the first two is of the tokenizer and its template
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

RUN_FOLDERS = ("checkpoints", "final", "merged", "tensorboard", *EXPORTS)
REPORTS = ("rows.csv", "report.md", "report.json", "loss.png")
RUN_FILES = ("run.yaml", "metrics.csv", "rejected.jsonl", *REPORTS, *RUN_FOLDERS)
OUTDATED = "the run was trained further since it was made"
FINISHED = ("final/delta.json", "delta.json", "config.json", "MANIFEST.json")  # one of them marks a complete folder
EXPORTED = [file for export in EXPORTS.values() for file in export.files] + ["README.md"]  # the last is the model card
# what --overwrite may remove
OURS = (*COMPANIONS, *RUN_FILES, *EXPORTED, "delta.json", "model.safetensors.index.json", CHECKSUMS)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` if the block succeeds, and is removed otherwise.

    An existing `path` is an error or, with `overwrite`, replaced in one step.
    """
    refuse_existing(path, overwrite)
    with replace_folder(path) as temporary:
        yield temporary


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Does the same, but replaces whatever is at `path`.

    An error of the disk names `path`, since the user does not know the folder beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        _commit(temporary, path)
    except OSError as error:
        if error.errno in FULL:
            raise disk_fault(error, path) from None
        raise
    except ResourceError as error:
        error.where = str(path) if Path(error.where).is_relative_to(temporary) else error.where
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced(path: Path, overwrite: bool, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Makes an empty folder at `path` for the block; an old folder is moved aside, and removed at the end.

    The old folder comes back if the block fails without a result or checkpoint. If there was none and the block had
    not `begun` its work, the new folder is removed, so that it is not in the way of the next try.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.parent / f".tmp-{path.name}-{os.getpid()}-old"
    if path.exists() and any(path.iterdir()):
        os.rename(path, old)
    empty = path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not has_result(path) and (old.exists() or not begun()):
            shutil.rmtree(path, ignore_errors=True)
            if old.exists():
                os.rename(old, path)
            elif empty:
                path.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def moved_aside(path: Path) -> Path | None:
    """Returns the old folder, which `replaced` has moved aside until there is a new one at `path`."""
    return next(path.parent.glob(f".tmp-{escape(path.name)}-*-old"), None)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks `path` during the block; raises if another process holds the lock.

    The lock is on a file beside `path`; the system releases it when the process ends, however that happens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".lock-{path.name}"
    while True:
        handle = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 (closed below, after the block)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            hint = "wait for it to end, or name another folder"
            raise ResourceError(f"{holder} is working on it", where=path, hint=hint) from None
        if lock.exists() and os.fstat(handle.fileno()).st_ino == lock.stat().st_ino:
            break
        handle.close()  # the former holder has removed this file, so it locks nothing: try again
    try:
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        handle.close()


def _commit(temporary: Path, path: Path) -> None:
    """Renames a finished folder to `path`; what was there is moved aside first and removed last."""
    old = path.parent / f".tmp-{path.name}-{os.getpid()}-old"
    try:
        sync_files(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise ResourceError(f"cannot be written: {error.strerror or error}", where=path) from error


def refuse_existing(path: Path, overwrite: bool, clear: bool = True) -> None:
    """Raises if `path` exists, unless `overwrite` is set and litpeft has written all that is in it.

    `clear` removes what a killed process left beside it; only one process of a run may do so.
    """
    if clear:
        remove_leftovers(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        what = f"the output exists{f', and {OUTDATED}' if is_outdated(path) else ''}"
        raise ConfigError(what, where=path, hint="name another, or say --overwrite")
    entries = [path] if not path.is_dir() else list(path.iterdir())
    half = [".tmp-*", ".lock-*", *(f"{name}.part" for name in RUN_FILES)]  # left by a killed process
    ours = ("*.safetensors", *half)
    foreign = sorted(p.name for p in entries if p.name not in OURS and not any(map(p.match, ours)))
    if foreign or path.is_symlink():
        what = f"the output holds {some(foreign)}, which litpeft did not write: it is not replaced"
        raise ConfigError(what, where=path, hint="name another")


def is_outdated(path: Path) -> bool:
    """Returns whether a folder in a run, as merged/ is, is older than the run's result, since it was trained further.

    The times are those of the files, which a copy may not keep: nothing is refused for it.
    """
    result, files = path.parent / "final" / "delta.json", path.glob("*")
    if path.name not in RUN_FOLDERS or path.name == "final" or not result.is_file():
        return False
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    return bool(times) and max(times) < result.stat().st_mtime_ns


def has_result(path: Path) -> bool:
    """Returns whether a folder is complete, or a run with a checkpoint to resume from."""
    return any((path / name).exists() for name in FINISHED) or any((path / "checkpoints").glob("step-*"))


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, in order, without reading them."""
    folders = (path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink())
    matches = (re.fullmatch(r"step-([0-9]{8,18})", path.name) for path in folders)
    return sorted(int(match[1]) for match in matches if match and match[0] == f"step-{int(match[1]):08d}")


def remove_leftovers(path: Path) -> None:
    """Cleans up after a killed process beside `path`: removes unfinished folders, moves an old one back."""
    for folder in path.parent.glob(f".tmp-{path.name}-*"):
        match = re.fullmatch(rf"\.tmp-{re.escape(path.name)}-(\d+)(-old)?", folder.name)
        if match is None or _alive(int(match.group(1))):
            continue
        if match.group(2) and not has_result(path):
            shutil.rmtree(path, ignore_errors=True)  # the folder that was to replace it has no result
            os.rename(folder, path)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Flushes a folder and all that is in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    """Returns whether another process has this id. If it is ours, an earlier process had it, as in a container."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yields a text file beside `path` that becomes `path` if the block succeeds, and is removed otherwise."""
    temporary = path.with_name(f".tmp-{os.getpid()}")  # path.name may be as long as a name can be
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(f"cannot be written: {error.strerror or error}", where=path) from None
    finally:
        if temporary.exists():
            temporary.unlink()
