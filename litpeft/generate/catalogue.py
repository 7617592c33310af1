"""What a server answers for, by name: models that it holds, and runs that it loads when a request names them.

Of the latter there may be more than fit in memory. S-LoRA https://arxiv.org/abs/2311.03285 serves thousands of adapters
so: those of the answers that are being written are held beside the base, the others wait on disk.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from litpeft.core.errors import UserError, counted, quoted
from litpeft.core.folders import moved_aside
from litpeft.core.terminal import tell
from litpeft.generate.protocol import Refused, busy
from litpeft.generate.served import RECORDS, Base, Served
from litpeft.generate.worker import Worker

MOST_NAMES = 20  # in an error
Version = tuple[str, int, int, int]  # of a run: it may be trained again


@dataclass
class Held:
    """A run in its place beside the base, and how many requests to it have not ended."""

    served: Served
    users: int = 0


class RunFolder:
    """The runs of a folder; the one idle longest gives its place to another that is named."""

    def __init__(self, folder: Path, base: Base, worker: Worker):
        self.folder, self.base, self.worker = folder, base, worker
        self.held: dict[tuple[str, Version], Held] = {}  # the one that was named last is the last
        self.free = list(base.places)
        self.loading = asyncio.Lock()  # taken in the order of the requests
        self.waiting = 0
        self.released = asyncio.Event()
        self.is_full = False  # every run that is held has requests, and another one waits for a place
        self.reader = ThreadPoolExecutor(1)

    def names(self) -> list[str]:
        """Returns the names of the runs that the folder has now."""
        return sorted(name for name in os.listdir(self.folder) if self.version(name) is not None)

    def version(self, name: str) -> Version | None:
        """Returns what tells a run from another one that replaces it; None if there is no run of that name."""
        if name[:1] in ("", ".") or {*name} & {"/", os.sep, "\0"}:  # what begins with a dot is being written
            return None
        for record in RECORDS:
            try:
                found = os.stat(self.place_of(name) / record)
            except (OSError, ValueError):  # too long a name, or half of a surrogate pair
                continue
            return record, found.st_ino, found.st_size, found.st_mtime_ns
        return None

    def place_of(self, name: str) -> Path:
        """Returns where a run is: while it is trained again, its old result is aside."""
        folder = self.folder / name
        whole = any((folder / record).exists() for record in RECORDS)
        return folder if whole else moved_aside(folder) or folder

    async def take(self, name: str) -> Held:
        """Returns a run with one more user, which gives it back with `release`.

        It is loaded if it has to be; where requests wait for a place, this one waits behind them.
        """
        version = self.version(name)
        held = None if self.is_full else self.held.get((name, version))
        if held is None:
            if self.waiting >= self.base.settings.max_waiting:
                raise busy()
            self.waiting += 1
            try:
                async with self.loading:
                    held = self.held.get((name, version)) or await self.load(name, version)
            finally:
                self.waiting -= 1
        self.held[name, version] = self.held.pop((name, version))
        held.users += 1
        return held

    def release(self, held: Held) -> None:
        held.users -= 1
        self.released.set()

    async def load(self, name: str, version: Version) -> Held:
        """Loads a run into a place."""
        loop, number = asyncio.get_running_loop(), None
        try:
            loaded, maps = await loop.run_in_executor(self.reader, self.base.read, self.place_of(name))
            number = await self.place()
            await asyncio.wrap_future(self.worker.between_steps(partial(self.base.put, number, maps)))
        except BaseException as error:
            self.free += [] if number is None else [number]
            if not isinstance(error, UserError):
                raise
            what = f"{name} cannot be served: {error.what}" + (f"; {error.hint}" if error.hint else "")
            tell(f"{what} ({error.where})" if error.where else what)
            raise Refused(what, "model") from None
        self.held[name, version] = held = Held(Served(loaded, self.base.batch, number))
        return held

    async def place(self) -> int:
        """Returns the number of a place that no request needs."""
        try:
            while not self.free:
                idle = next((key for key, held in self.held.items() if not held.users), None)
                if idle is not None:
                    return self.held.pop(idle).served.adapter
                self.is_full = True
                self.released.clear()
                await self.released.wait()
            return self.free.pop()
        finally:
            self.is_full = False


class Catalogue:
    """All that a server answers for."""

    def __init__(self, served: Mapping[str, Served], folder: RunFolder | None):
        self.served, self.folder = served, folder

    def names(self) -> list[str]:
        later = [] if self.folder is None else self.folder.names()
        return [*self.served, *(name for name in later if name not in self.served)]

    def said(self) -> str:
        """Returns lines about it."""
        said = f"{counted(len(self.served), 'model')}: {', '.join(self.served)}"
        if self.folder is None:
            return said
        runs, most = self.folder.names(), len(self.folder.base.places)
        said += f"\nand the runs of {self.folder.folder}: {counted(len(runs), 'run')} now, at most {most} in memory"
        hidden = [name for name in runs if name in self.served]
        return said + "".join(f"\nwarning: {name} is the model above, not the run in the folder" for name in hidden)

    def check(self, name: str) -> None:
        """Raises Refused unless there is a model of this name."""
        if name in self.served or (self.folder is not None and self.folder.version(name) is not None):
            return
        names = self.names()
        there = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES:,} more" if names[MOST_NAMES:] else "")
        what = f"there is no model {quoted(name)}; there is {there}"
        raise Refused(what, "model", status=404, code="model_not_found")

    async def take(self, name: str) -> tuple[Served, Callable[[], None]]:
        """Returns a model, and what is to be called, once or more, when its answers are complete."""
        self.check(name)
        if name in self.served:
            return self.served[name], lambda: None
        held = await self.folder.take(name)
        left = [held]
        return held.served, lambda: self.folder.release(left.pop()) if left else None

    def close(self) -> None:
        if self.folder is not None:
            self.folder.reader.shutdown()
