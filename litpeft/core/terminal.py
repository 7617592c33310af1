"""All that litpeft prints: no text from outside may drive the terminal, and nothing depends on its being there.

Names of files, keys, rows, what a template or a model says: all of it is text from outside. No other file prints.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Control characters but the line break (C0, DEL, C1), lone surrogates, and what reorders the text around it.
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def clean(text: str) -> str:
    """Returns `text` without what a terminal would obey or UTF-8 cannot hold."""
    return UNSAFE.sub("\ufffd", text.replace("\r\n", "\n").expandtabs(4))


def say(text: object = "", *, end: str = "\n", colored: bool = False) -> None:
    """Prints a message on stdout; `colored`: it is clean, and has our own colours in it."""
    print(text if colored else clean(str(text)), end=end, flush=True)


def tell(text: object) -> None:
    """Prints a message on stderr: what is no result."""
    print(clean(str(text)), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Writes a part of a result on stdout: as it is to a file or a pipe, so that a terminal shows it only, to that."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def command_line(*words: object) -> str:
    """Returns a litpeft command for the user to copy, with each word quoted as the shell wants it."""
    return shlex.join(["litpeft", *map(str, words)])


class Lasting:
    """A stream whose texts are dropped once they can no longer be written: a terminal that closed, a reader that left.

    Its file is then /dev/null, so that what Python flushes at its end cannot fail either.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with suppress(OSError, ValueError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting(*names: str) -> Iterator[None]:
    """Makes these streams of `sys` last, for the time of the block."""
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, Lasting(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
