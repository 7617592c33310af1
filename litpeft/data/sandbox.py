"""Runs chat templates in a process of their own (litpeft/data/renderer.py) with limits on CPU time and memory.

One process renders all texts of a Template and ends with it, or at once when this process dies: its stdin then ends.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from litpeft.data.pipes import packed, receive

MAX_TEMPLATE = 256 * 1024  # characters
BATCH = 128  # chats that are rendered together
BATCH_BYTES = 1 << 20  # a larger batch is rendered text by text
LARGE = 1 << 19  # bytes of a chat: if a larger one meets a limit, the chat is too long, not the template too costly
LAST_RESORT = 60.0  # seconds beyond the limits, after which the process is taken to hang
POLL = 0.05  # seconds between checks of the process's memory
MACOS = sys.platform == "darwin"  # its kernel does not limit memory
TOO_SLOW = -signal.SIGPROF  # exit code at the limit of CPU time
START = "import sys; sys.path += sys.argv[1:]; from litpeft.data.renderer import serve; serve()"
PACKAGES = ("litpeft", "jinja2", "markupsafe")  # what the process imports beside the standard library
# the variables that Python may need to start; secrets such as HF_TOKEN are not passed on
ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")

Process = subprocess.Popen[bytes]
Text = tuple[dict[str, Any], Sequence[str]]  # variables, and the marks before and after each generation block
T = TypeVar("T")
Task = Generator[Text, str, T]  # yields what it wants rendered, is sent the text, and returns its result


class Limits(NamedTuple):
    """What rendering a text may cost."""

    seconds: float  # of CPU time, which does not depend on how busy the machine is
    memory: int  # bytes
    characters: int  # of the result

    @classmethod
    def of(cls, size: int) -> "Limits":
        """Returns the limits for messages of so many bytes. Honest templates take milliseconds."""
        return cls(0.5 * (1 + size / (1 << 20)), (512 << 20) + 32 * size, (4 << 20) + 4 * size)


class LimitError(Exception):
    """The template costs more than it may; `number` is the index of the task that met the limit."""

    def __init__(self, what: str, number: int = 0):
        super().__init__(what)
        self.number = number


class TooLong(ValueError):
    """A chat is too long to be rendered within the limits; the template is not to blame."""


class Template:
    """A compiled template. Raises LimitError if it costs too much, ValueError for all other errors.

    `now` is the date that it may print; `constants` are variables of every text.
    """

    def __init__(self, source: str, now: datetime, constants: dict[str, Any] | None = None):
        if len(source) > MAX_TEMPLATE:
            raise LimitError(f"it is longer than {MAX_TEMPLATE:,} characters")
        self.has_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._setup = packed((source, now.isoformat(), constants or {}))
        self._compiling = Limits.of(8 * len(self._setup))  # compiling takes longer per character than rendering
        self._process: Process | None = None
        self._lock = threading.Lock()
        self._one({})

    def render(self, variables: dict[str, Any]) -> str:
        """Returns the text of these variables, without marks around generation blocks."""
        return self._one({0: (variables, ("", ""))})

    def run(self, tasks: Sequence[Task[T]]) -> list[T | ValueError]:
        """Returns the result of each task, or its error; the texts that tasks wait for are rendered together."""
        results: dict[int, Any] = {}
        for start in range(0, len(tasks), BATCH):
            results |= self._run(dict(enumerate(tasks[start : start + BATCH], start)))
        return [results[number] for number in range(len(tasks))]

    def _run(self, tasks: dict[int, Task[T]]) -> dict[int, T | ValueError]:
        results: dict[int, Any] = {}
        answers: dict[int, Any] = dict.fromkeys(tasks)
        while answers:
            asked: dict[int, Text] = {}
            for number, answer in answers.items():
                task = tasks[number]
                try:
                    asked[number] = task.throw(answer) if isinstance(answer, ValueError) else task.send(answer)
                except StopIteration as stop:
                    results[number] = stop.value
                except ValueError as error:
                    results[number] = error
            answers = self._ask(asked) if asked else {}
        return results

    def _one(self, texts: dict[int, Text]) -> str:
        [text] = self._ask(texts).values()
        if isinstance(text, ValueError):
            raise text
        return text

    def _ask(self, texts: dict[int, Text]) -> dict[int, str | ValueError]:
        """Returns each rendered text, or its error, by its task; without texts, what compiling the template gives."""
        question, numbers = packed(list(texts.values())), list(texts) or [0]
        limits = Limits.of(len(question)) if texts else self._compiling
        if len(texts) > 1 and len(question) > BATCH_BYTES:
            return self._ask_each(texts)
        answers, code = self._exchange(question, len(texts), limits)
        if code not in (None, TOO_SLOW) and len(texts) < 2:  # something else may have ended it: try again
            answers, code = self._exchange(question, len(texts), limits)
        costly = [answer["limit"] for answer in answers if isinstance(answer, dict) and "limit" in answer]
        if code is None and not costly:
            found = [answer if isinstance(answer, str) else ValueError(answer["error"]) for answer in answers]
            return dict(zip(numbers, found, strict=True))
        if len(texts) > 1:  # find the one that met the limit
            return self._ask_each(texts)
        reason = costly[0] if costly else _reason(code, limits)
        if len(question) > LARGE:
            return {numbers[0]: TooLong(f"its {len(question):,} bytes are too many for the chat template: {reason}")}
        raise LimitError(reason, numbers[0])

    def _ask_each(self, texts: dict[int, Text]) -> dict[int, str | ValueError]:
        return {number: self._ask({number: text})[number] for number, text in texts.items()}

    def _exchange(self, question: bytes, count: int, limits: Limits) -> tuple[list[Any], int | None]:
        """Returns the answers, and the process's exit code if it ended before it had given them all."""
        with self._lock:
            try:
                if self._process is None:
                    self._process = _start()
                    self._end = weakref.finalize(self, _end, self._process)
                    answers = _answers(self._process, self._setup, 1, self._compiling)
                    if not answers:
                        return answers, self._close()
                if count:
                    answers = _answers(self._process, question, count, limits)
                return answers, None if len(answers) >= count else self._close()
            except BaseException:  # Ctrl-C: unread answers would be taken for those of the next question
                self._close()
                raise

    def _close(self) -> int:
        self._process = None
        return self._end()


def _start() -> Process:
    """Starts the process, in a session of its own so that Ctrl-C does not reach it."""
    # the packages' own folders, not sys.path: an editable installation is on none of its entries
    files = [Path(find_spec(name).origin) for name in PACKAGES]
    command = [sys.executable, "-I", "-S", "-c", START, *dict.fromkeys(str(file.parent.parent) for file in files)]
    environment, pipe = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}, subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)


def _end(process: Process) -> int:
    """Ends the process if it still runs; returns its exit code."""
    process.kill()
    with suppress(OSError):  # it may flush to a closed pipe
        process.stdin.close()
    process.stdout.close()
    return process.wait()


def _answers(process: Process, question: bytes, count: int, limits: Limits) -> list[Any]:
    """Returns the answers of the process: fewer than `count` if it ends early."""
    done, answers = threading.Event(), []
    seconds = LAST_RESORT + 2 * count * limits.seconds
    threading.Thread(target=_watch, args=(process, done, seconds, limits.memory), daemon=True).start()
    try:
        process.stdin.write(packed(tuple(limits)) + question)
        process.stdin.flush()
        while len(answers) < count:
            answers += receive(process.stdout)
    except (BrokenPipeError, EOFError):  # the process has ended
        pass
    finally:
        done.set()
    return answers


def _watch(process: Process, done: threading.Event, seconds: float, memory: int, look: bool = MACOS) -> None:
    """Kills the process if it is not done in time or, with `look`, once it holds more memory."""
    ends = time.monotonic() + seconds
    while not done.wait(POLL if look else seconds):
        if time.monotonic() >= ends or (look and _resident(process.pid) > memory):
            process.kill()
            return


def _resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    size = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return int(size or 0) << 10


def _reason(code: int, limits: Limits) -> str:
    """Returns why the process ended with this exit code."""
    if code == TOO_SLOW:
        return f"it takes more than {limits.seconds:.1f} s of processor time"
    if code == -signal.SIGKILL:
        return f"its process was killed: it held more than {limits.memory >> 20:,} MiB, or stood still"
    return f"it ended its process ({signal.Signals(-code).name if code < 0 else f'code {code}'})"
