"""Text on a terminal: what a model or a data set wrote must not drive it."""

import shlex
import unicodedata


def clean(text: str) -> str:
    """Returns `text` without what a terminal would obey or UTF-8 cannot hold: control characters, lone surrogates."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return "".join("\ufffd" if c != "\n" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def command_line(*words: object) -> str:
    """Returns a litpeft command for the user to copy, with each word quoted as the shell wants it."""
    return shlex.join(["litpeft", *map(str, words)])
