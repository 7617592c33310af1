"""Text on a terminal: what a model or a data set wrote must not drive it, and nothing depends on its being there."""

import os
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def clean(text: str) -> str:
    """Returns `text` without what a terminal would obey or UTF-8 cannot hold: control characters, lone surrogates."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return "".join("\ufffd" if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


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
