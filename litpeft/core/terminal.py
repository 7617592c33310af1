"""All output of litpeft. Text from outside cannot control the terminal, and a closed terminal is no error.

Text from outside is the name of a file, a key, a row, the output of a template or a model. No other module prints.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# control characters (C0, DEL, C1) but the line break, lone surrogates, and bidirectional controls
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
GREEN, INVERSE, PLAIN = "\x1b[32m", "\x1b[7m", "\x1b[0m"


def clean(text: str) -> str:
    """Returns `text` with characters that control a terminal, or that UTF-8 cannot encode, replaced."""
    return UNSAFE.sub("\ufffd", text.replace("\r\n", "\n").expandtabs(4))


def is_first() -> bool:
    """Returns whether this is the rank that prints and writes; works before the process group exists."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
    if "LOCAL_RANK" not in os.environ:
        names = ("SLURM_PROCID",)
    return all(os.environ.get(name, "0") == "0" for name in names)


def say(text: object = "", *, end: str = "\n", colored: bool = False) -> None:
    """Prints a message on stdout, on the first rank; `colored`: it is clean already, and has our own colours in it."""
    if is_first():
        print(text if colored else clean(str(text)), end=end, flush=True)


def tell(text: object) -> None:
    """Prints a message that is not a result, on stderr."""
    print(clean(str(text)), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Writes a part of a result on stdout: unchanged to a file or pipe, cleaned to a terminal."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def command_line(*words: object) -> str:
    """Returns a litpeft command for the user to copy, quoted for the shell."""
    return shlex.join(["litpeft", *map(str, words)])


class TolerantStream:
    """A stream that drops its output once it cannot be written, since the terminal or the pipe's reader is gone.

    Its file is then /dev/null, so that the flush at the end of Python cannot fail either.
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
def tolerant_streams(*names: str) -> Iterator[None]:
    """Makes these streams of `sys` tolerant during the block."""
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, TolerantStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
