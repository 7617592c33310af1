"""Tokenised rows that are kept on disk, so that the next start on the same files does not tokenise them again.

A file is called by the sha256 of all that its rows depend on: the bytes of the sources, the tokenizer, the template,
the settings and the code. It ends with the sha256 of what is in it.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import numpy as np
import tokenizers

from litpeft.core.checksums import file_sha256
from litpeft.core.terminal import is_first, tell
from litpeft.data.kept import Thoughts
from litpeft.data.readers import STDIN
from litpeft.data.readers.record import Rejected
from litpeft.data.report import Report, Weights
from litpeft.data.settings import Data
from litpeft.data.sources import Source
from litpeft.data.store import ENTRY, Descriptor, Rows, RowWriter
from litpeft.data.templates import ChatTemplate

LEAST = 1000  # rows that are kept: fewer are tokenised in a second
MOST = 10 << 30  # bytes of all files; those that were not used for longest go first
TAIL = struct.Struct("<qqq32s")  # where index and facts begin, where they end, and the sha256 of all before it
# settings that act on rows that are tokenised
AFTER = ("seed", "validation_split", "packing", "group_by_length", "cache")
COUNTED_LATER = ("train", "validation", "duplicates", "repeated")  # of the report
ABANDONED = 24 * 3600  # seconds after which a half-written file is one of a killed process
Found = tuple[Rows, int, Report]  # with the number of chats


def folder() -> Path:
    """Returns where the files are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litpeft" / "rows"


@cache
def code() -> str:
    """Returns what stands for the code that makes rows."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{digest} {tokenizers.__version__} {jinja2.__version__} {platform.python_version()}"


def key_of(data: Data, sources: Sequence[Source], held_out: int, template: ChatTemplate, report: Report) -> str:
    """Returns the name of the file for the rows of these sources, of which the last are held out."""
    tokenizer = template.tokenizer
    depends = {
        "code": code(),
        "sources": [_facts(source) for source in sources],
        "held_out": held_out,
        "settings": {key: value for key, value in asdict(data).items() if key not in AFTER},
        "max_length": report.max_length,
        "pairs": report.pairs,
        "tokenizer": hashlib.sha256(tokenizer.backend.inner.to_str().encode()).hexdigest(),
        "special": [tokenizer.special_tokens, sorted(tokenizer.backend.specials.items()), tokenizer.opening],
        "template": [template.name, template.source, template.end_of_turn, template.options],
        "date": template.now.isoformat() if "strftime_now" in template.source else "",
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _facts(source: Source) -> list[Any]:
    """Returns what a file's rows depend on; its name is in theirs, and a preset says what they mean."""
    preset = None if source.preset is None else source.preset.source
    return [str(source), source.shown, preset, source.weight, file_sha256(source.path)]


class RowCache:
    """The file for one data set; there is none for standard input, or where data.cache is false."""

    def __init__(self, data: Data, sources: Sequence[Source], held_out: int, template: ChatTemplate, report: Report):
        self.path: Path | None = None
        if data.cache and all(str(source.path) != STDIN for source in sources):
            self.path = folder() / f"{key_of(data, sources, held_out, template, report)}.rows"

    def load(self) -> Found | None:
        """Returns the rows, or None if they are not there; a damaged file counts as missing, and is replaced."""
        try:
            if self.path is None:
                return None
            with open(self.path, "rb") as handle:
                found = _read(handle)
            os.utime(self.path)
        except OSError:
            return None
        except (ValueError, KeyError, TypeError, struct.error) as error:
            tell(f"note: {self.path} is damaged ({error}): the rows are tokenised again")
            return None
        found[2].cache = str(self.path)
        return found

    def save(self, writer: RowWriter, index: np.ndarray, chats: int, report: Report) -> None:
        """Keeps rows that were written; where that is not possible, says so."""
        if self.path is None or len(index) < LEAST:
            return
        index_at = writer.put(index.view(np.uint8).data)
        facts_at = writer.put(json.dumps({"chats": chats, "report": vars(report)}, default=vars).encode())
        tail = TAIL.pack(index_at, facts_at, writer.at, writer.sha256.digest())
        temporary = self.path.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make_room(self.path.parent, writer.at)
            with open(temporary, "wb") as handle:
                writer.handle.seek(0)
                shutil.copyfileobj(writer.handle, handle, 1 << 20)
                handle.write(tail)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            if is_first():
                tell(f"note: the rows cannot be kept in {self.path.parent}: {error.strerror or error}")
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _read(handle: BinaryIO) -> Found:
    """Returns what a file holds; raises ValueError if it is not whole."""
    size = os.fstat(handle.fileno()).st_size
    index_at, facts_at, end, sha256 = TAIL.unpack(os.pread(handle.fileno(), TAIL.size, max(0, size - TAIL.size)))
    if not 0 <= index_at <= facts_at <= end == size - TAIL.size:
        raise ValueError("it is cut off, or not such a file")
    digest, left = hashlib.sha256(), end
    while left and (block := handle.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if digest.digest() != sha256:
        raise ValueError("its content does not have its sha256")
    descriptor = Descriptor(handle)
    index = np.frombuffer(descriptor.read(index_at, facts_at - index_at), ENTRY)
    facts = json.loads(descriptor.read(facts_at, end - facts_at))
    return Rows(descriptor, index), facts["chats"], _report(facts["report"])


def _report(saved: dict[str, Any]) -> Report:
    """Returns a report as it was."""
    lists = {name: [Rejected(**bad) for bad in saved[name]] for name in ("rejected", "dropped")}
    counters = {name: Counter(saved[name]) for name in ("formats", "unread")}
    left_out = {name: saved[name] for name in saved if name not in COUNTED_LATER}
    parts = {"thoughts": Thoughts(**saved["thoughts"]), "weights": Weights(**saved["weights"])}
    return Report(**left_out | lists | counters | parts)


def _make_room(there: Path, needed: int) -> None:
    """Removes the files that were not used for longest, until so many bytes more are no more than MOST."""
    for file in there.glob(".tmp-*"):
        if time.time() - file.stat().st_mtime > ABANDONED:
            file.unlink(missing_ok=True)
    files = sorted(((file.stat(), file) for file in there.glob("*.rows")), key=lambda pair: pair[0].st_mtime)
    total = needed + sum(stat.st_size for stat, _ in files)
    for stat, file in files:
        if total <= MOST:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
