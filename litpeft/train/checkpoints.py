"""The checkpoints of a run: folders that are written completely or not at all, and verified before they are read.

RUN/checkpoints/step-00000123/
    delta.safetensors, optimizer.safetensors, ...   tensors, one file for each stem
    state.json                                      where the run is, in plain values
    MANIFEST.json                                   size and sha256 of each file, what the run was made of, checksum
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.checksums import file_sha256, read_header
from litpeft.core.errors import ModelError, NumericError, ResourceError, UserError
from litpeft.core.folders import checkpoint_steps, remove_leftovers, replace_folder, sync
from litpeft.core.json import read_json
from litpeft.core.safetensors import save_tensors
from litpeft.core.terminal import say
from litpeft.exchange.identity import checksum

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"


@dataclass
class Checkpoint:
    """A checkpoint on disk whose files were verified."""

    step: int  # optimizer steps done
    folder: Path
    state: dict[str, Any]
    facts: dict[str, Any]

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Returns the tensors of STEM.safetensors, memory-mapped."""
        path = self.folder / f"{stem}.safetensors"
        if path.name not in read_json(self.folder / MANIFEST, "the file")["files"]:  # only those were verified
            raise ModelError(f"this checkpoint holds no {path.name}", where=str(self.folder))
        return load_file(path)


class Checkpoints:
    """The folder `RUN/checkpoints`. One process of a run writes it; the newest is that of the highest step."""

    def __init__(self, folder: Path, keep_last: int = 2, tell: Callable[[str], None] = say, clear: bool = True):
        """`clear` removes what killed runs left; only one process of a run may do so."""
        assert keep_last >= 1, "a run keeps at least its last checkpoint"
        self.folder, self.keep_last, self.tell = Path(folder), keep_last, tell
        self._seen: dict[int, list[tuple]] = {}  # step -> stat_signature when it was last verified
        left = (re.fullmatch(r"\.tmp-(step-[0-9]{8,})-[0-9]+(-old)?", p.name) for p in self.folder.glob(".tmp-step-*"))
        try:
            for name in sorted({match[1] for match in left if match and clear}):
                remove_leftovers(self.folder / name)
        except OSError as error:
            what = f"what a killed run left cannot be cleared: {error.strerror or error}"
            raise ResourceError(what, where=str(self.folder)) from None

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order, without verifying them."""
        return checkpoint_steps(self.folder)

    def newest(self) -> Checkpoint | None:
        """Returns the newest valid checkpoint, or None; says why newer ones are passed over."""
        found, broken = None, {}
        for step in reversed(self.steps()):
            try:
                found = self._read(step)
                break
            except ValueError as error:
                broken[step] = error
        for step, why in broken.items():
            instead = f"{folder_name(found.step)} is taken" if found else "there is no whole one before it"
            self.tell(f"checkpoint {folder_name(step)} is passed over ({why}): {instead}")
        return found

    def at(self, step: int) -> Checkpoint:
        """Returns the checkpoint of this step."""
        steps = self.steps()
        if step not in steps:
            what = f"there is no checkpoint of step {step}; there is {', '.join(map(str, steps)) or 'none'}"
            raise ModelError(what, where=str(self.folder))
        try:
            return self._read(step)
        except ValueError as error:
            others = ", ".join(str(other) for other in steps if other != step)
            hint = f"take another: {others}" if others else "begin the run again"
            raise ModelError(str(error), where=str(self.folder / folder_name(step)), hint=hint) from None

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        facts: dict[str, Any],
        keep: Collection[int] = (),
    ) -> None:
        """Writes the checkpoint of a step, and then removes others.

        The newest `keep_last` valid ones up to this step stay, and those of the steps in `keep`. One of a later step is
        removed: the run was resumed before it, and the next resume must not find it.
        """
        bad = next(nonfinite({**tensors, "state": state, "facts": facts}), None)
        if bad:
            what = f"{bad} is not finite at step {step}: no checkpoint is written, the ones before are as they were"
            raise NumericError(what, where=str(self.folder))
        new, path = not self.folder.is_dir(), self.folder / folder_name(step)
        try:
            with replace_folder(path) as folder:
                for stem, named in tensors.items():
                    save_tensors(named, folder / f"{stem}.safetensors")
                (folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
                files = {p.name: {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(folder.iterdir())}
                record = {"format": FORMAT, "step": step, "files": files, "facts": json.loads(json.dumps(facts))}
                record["checksum"] = checksum(record)
                (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if new:  # flush the folder's and the run's entries in their parents, too
                sync(self.folder.parent)
                with suppress(PermissionError):  # it may belong to someone else
                    sync(self.folder.parent.parent)
            self._seen[step] = stat_signature(path)
        except (OSError, UserError) as error:
            why = error.what if isinstance(error, UserError) else error.strerror or error
            what = f"the checkpoint of step {step} is not written, the ones before are as they were: {why}"
            hint = "make room or give the right to write there, then go on with --resume true"
            raise ResourceError(what, where=str(self.folder), hint=hint) from error
        self._prune(step, keep)

    def _read(self, step: int) -> Checkpoint:
        """Returns a checkpoint after verifying its files; raises a ValueError if one is damaged."""
        folder = self.folder / folder_name(step)
        try:
            facts = read_manifest(folder, step)
            checkpoint = Checkpoint(step, folder, read_json(folder / STATE, "the file"), facts)
            check_finite(checkpoint.state, STATE)
            self._seen[step] = stat_signature(folder)
        except UserError as error:
            raise ValueError(f"{Path(error.where).name}: {error.what}") from None
        except (OSError, RecursionError) as error:
            raise ValueError(f"cannot be read: {error}") from None
        return checkpoint

    def _is_valid(self, step: int) -> bool:
        """Returns whether a checkpoint is valid; reads it only if its files changed since they were verified."""
        try:
            if self._seen.get(step) != stat_signature(self.folder / folder_name(step)):
                self._read(step)
        except (OSError, ValueError):
            return False
        return True

    def _prune(self, step: int, keep: Collection[int]) -> None:
        kept = {step}
        for older in reversed(self.steps()):
            if len(kept) < self.keep_last and older < step and self._is_valid(older):
                kept.add(older)
        for other in self.steps():
            if other in kept or other in keep:
                continue
            path = self.folder / folder_name(other)
            gone = self.folder / f".tmp-{path.name}-{os.getpid()}"  # the next run removes it if this one is killed now
            try:
                os.rename(path, gone)
            except OSError as error:
                self.tell(f"checkpoint {path.name} cannot be removed: {error.strerror or error}")
                continue
            shutil.rmtree(gone, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def stat_signature(folder: Path) -> list[tuple]:
    """Returns sizes, times and inodes of a folder's files, which change if a file does."""
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """Returns the facts in a checkpoint's manifest after verifying all files; a ValueError names the damaged one."""
    if (folder / MANIFEST).is_symlink() or not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    record = read_json(folder / MANIFEST, "the file")
    if record.pop("checksum", None) != checksum(record):
        raise ValueError(f"{MANIFEST}: checksum mismatch")
    files, facts = record.get("files"), record.get("facts")
    if record.get("format") != FORMAT or not isinstance(files, dict) or not isinstance(facts, dict):
        raise ValueError(f"{MANIFEST}: format {str(record.get('format'))[:20]!r} is not of this version of litpeft")
    if record.get("step") != step:
        raise ValueError(f"{MANIFEST} is of step {str(record.get('step'))[:20]!r}")
    if STATE not in files:
        raise ValueError(f"{MANIFEST} does not name {STATE}")
    for name, written in files.items():
        path = folder / name
        if not re.fullmatch(r"\w+\.(safetensors|json)", name, re.ASCII) or path.is_symlink():
            raise ValueError(f"{name[:60]!r} escapes the checkpoint's folder")
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        size, digest = (written.get(key) for key in ("size", "sha256")) if isinstance(written, dict) else (None, None)
        if path.stat().st_size != size:
            raise ValueError(f"{name}: size {path.stat().st_size} of {str(size)[:20]}")
        if file_sha256(path) != digest:
            raise ValueError(f"{name}: sha256 mismatch")
        if path.suffix == ".safetensors":
            read_header(path)
            check_finite(load_file(path), name)
    return facts


def check_finite(values: dict[str, Any], name: str) -> None:
    """Raises a ValueError that names the first value of a file that is not finite."""
    bad = next(nonfinite(values), None)
    if bad:
        raise ValueError(f"{name}: {bad} is not finite")


def nonfinite(value: object, name: str = "") -> Iterator[str]:
    """Yields the name of each tensor and number in `value`, a dict of them at any depth, that is not finite."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nonfinite(item, f"{name}: {key}" if name else str(key))
    elif isinstance(value, Tensor):
        if not torch.isfinite(value).all():
            yield name
    elif isinstance(value, float) and not math.isfinite(value):
        yield name
