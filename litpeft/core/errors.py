"""The errors that a user may see, and the exit codes of the program."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PEER_LOST = 7  # another process of the run is gone
INTERNAL_ERROR = 70
INTERRUPTED = 130  # by Ctrl-C
STOPPED = 75  # by SIGTERM, SIGHUP or SIGUSR1, with what was learnt saved: a scheduler may start it again

LONGEST = 3000  # characters of a part of an error


class UserError(Exception):
    """Something that the user can put right, told in one line. A subclass says what is at fault.

    `where` is the file, `file:line` or key that is wrong; `hint` says what to do.
    """

    exit_code: int  # of the program that the error ends

    def __init__(self, what: str, *, where: str | Path = "", hint: str = ""):
        super().__init__(what)
        self.what, self.where, self.hint = what, str(where), hint

    def __str__(self) -> str:
        place = f" {cut(self.where)}:".replace("\n", "\ufffd") if self.where else ""
        hint = f"hint: {cut(self.hint)}" if self.hint else ""
        parts = filter(None, (f"error:{place} {brief(self.what)}", hint))
        return "\n".join(part.replace("\n", "\n  ") for part in parts)  # text from outside cannot begin a line


class ConfigError(UserError):
    """A key, a value or the command line."""

    exit_code = 2


class DataError(UserError):
    """A row or a file of the data set."""

    exit_code = 3


class ModelError(UserError):
    """A file of a model, a tokenizer or a run."""

    exit_code = 4


class NumericError(UserError):
    """A number that is not finite, or a run that learned nothing."""

    exit_code = 5


class ResourceError(UserError):
    """Disk, memory or network."""

    exit_code = 6


@contextmanager
def located(where: str | Path) -> Iterator[None]:
    """Gives this place to an error of the block that names none."""
    try:
        yield
    except UserError as error:
        error.where = error.where or str(where)
        raise


def brief(text: str) -> str:
    """Returns a message, shortened, as are its longest words, which come from outside."""
    return cut(re.sub(r"(\S{100})\S{200,}(\S{20})", r"\1…\2", text))


def cut(text: str) -> str:
    """Returns a text shortened to LONGEST, with its end."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 400]} … {text[-400:]}"


def quoted(value: object) -> str:
    """Returns the repr of a value from outside, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def nearest(word: str, options: list[str]) -> str:
    """Returns ` (did you mean "x"?)` for the option most like `word`, or an empty string."""
    from difflib import get_close_matches

    hits = get_close_matches(word, options, n=1, cutoff=0.6)
    return f' (did you mean "{hits[0]}"?)' if hits else ""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def scaled(number: float, unit: str = "") -> str:
    """Returns a number with the decimal prefix that makes it short: 912, 4.9 MB, 134.5 M."""
    if number < 1000:
        return f"{number} {unit}".rstrip()
    for prefix in "kMGT":
        number /= 1000
        if number < 999.95:
            break
    return f"{number:,.1f} {prefix}{unit}"


def some(names: list[str], between: str = ", ") -> str:
    """Returns at most five names as text, and the number of the others."""
    return between.join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
