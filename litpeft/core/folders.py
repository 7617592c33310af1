"""Folders that appear as a whole or not at all, and what a killed process may leave of them."""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from litpeft.core.checksums import CHECKSUMS
from litpeft.core.errors import ConfigError, ResourceError, some

# What belongs to a model beside its weights; copied from folder to folder as it is.
COMPANIONS = (
    "config.json",
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

RUN_FOLDERS = ("checkpoints", "final", "merged", "tensorboard")
RUN_FILES = ("run.yaml", "metrics.csv", "rejected.jsonl", "report.md", "report.json", "loss.png", *RUN_FOLDERS)
LONGEST_NAME = 255  # bytes, of the file systems in use
FINISHED = ("final/delta.json", "delta.json", "config.json", "MANIFEST.json")  # one of them: a folder that is whole
OURS = (*COMPANIONS, *RUN_FILES, "delta.json", "model.safetensors.index.json", CHECKSUMS)  # what --overwrite may remove


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and is removed otherwise.

    A `path` that exists is refused, or, with `overwrite`, replaced as a whole: no reader ever sees half of either.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    with whole_folder(path) as temporary:
        yield temporary


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Does the work of `atomic_folder`, and replaces what is at `path` whatever it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        _commit(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced(path: Path, overwrite: bool, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Makes an empty folder at `path` for the block; what was there is moved aside.

    It comes back if the block fails, but not if that leaves something to go on from. Where nothing was there, and the
    block had not even `begun` its work, its folder goes: it would only be in the way of the next try.
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


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes from working on `path` for the time of the block; one that already does is an error.

    The lock is a file beside `path` that the system frees when its process ends, however that happens.
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
            raise ResourceError(f"{holder} is working on it", where=str(path), hint=hint) from None
        if lock.exists() and os.fstat(handle.fileno()).st_ino == lock.stat().st_ino:
            break
        handle.close()  # the one before has just removed its file: ours is not the one that the next will find
    try:
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        handle.close()


def _commit(temporary: Path, path: Path) -> None:
    """Makes a finished folder take its place; what was there is moved aside first and removed last."""
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
        raise ResourceError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


def check_place(path: Path) -> None:
    """Raises if no folder can lie at `path`: its name is too long, say, or a file lies on the way."""
    why = ""
    try:
        path.lstat()
    except FileNotFoundError:  # what is beside it while it is written has the longest name
        names = (*path.parts, f".tmp-{path.name}-{os.getpid()}-old")
        why = "a name in it is too long" if max(len(os.fsencode(name)) for name in names) > LONGEST_NAME else ""
    except OSError as error:
        why = error.strerror
    if why:
        raise ConfigError(f"this can be no folder: {why}", where=str(path), hint="name another")


def refuse_existing(path: Path, overwrite: bool, clear: bool = True) -> None:
    """Raises if `path` holds something that was not said to be replaced, or that litpeft did not write.

    What a killed process left beside it is removed if `clear`: one process of a run may do that.
    """
    if clear:
        remove_leftovers(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ConfigError("the output exists", where=str(path), hint="name another, or say --overwrite")
    entries = [path] if not path.is_dir() else list(path.iterdir())
    half = [".tmp-*", ".lock-*", *(f"{name}.part" for name in RUN_FILES)]  # what a kill left of us
    foreign = sorted(
        p.name for p in entries if p.name not in OURS and not any(p.match(name) for name in ("*.safetensors", *half))
    )
    if foreign or path.is_symlink():
        what = f"the output holds {some(foreign)}, which litpeft did not write: it is not replaced"
        raise ConfigError(what, where=str(path), hint="name another")


def has_result(path: Path) -> bool:
    """Returns whether a folder is whole, or a run that can go on from a checkpoint."""
    return any((path / name).exists() for name in FINISHED) or any((path / "checkpoints").glob("step-*"))


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps that `folder`, a run's checkpoints, has one of, in order; what is in them is not looked at."""
    folders = (path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink())
    matches = (re.fullmatch(r"step-([0-9]{8,18})", path.name) for path in folders)
    return sorted(int(match[1]) for match in matches if match and match[0] == f"step-{int(match[1]):08d}")


def remove_leftovers(path: Path) -> None:
    """Clears what a killed process left beside `path`: unfinished folders go, one that was moved aside comes back."""
    for folder in path.parent.glob(f".tmp-{path.name}-*"):
        match = re.fullmatch(rf"\.tmp-{re.escape(path.name)}-(\d+)(-old)?", folder.name)
        if match is None or _alive(int(match.group(1))):
            continue
        if match.group(2) and not has_result(path):
            shutil.rmtree(path, ignore_errors=True)  # what was to take its place, and never got its result
            os.rename(folder, path)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Forces all that is in a folder to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Forces a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    """Returns whether another process has this number; what has ours is of one before us, as in a container."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yields a text file beside `path` that becomes `path` when the block ends well, and is removed otherwise."""
    temporary = path.with_name(f".tmp-{os.getpid()}")  # as short as it can be: path.name may have the longest name
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
    finally:
        if temporary.exists():
            temporary.unlink()
