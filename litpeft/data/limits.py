"""What a chat template may cost. Nothing that is asked for here is made before it has been estimated."""

import re
import threading
import time
from collections.abc import Iterable
from typing import Any

import jinja2

MAX_TEMPLATE = 256 * 1024  # characters
MAX_WEIGHT = 4 * 1024 * 1024  # characters and elements of a value, and of the whole output
MAX_TOTAL = 64 * MAX_WEIGHT  # of all values that one rendering makes
MAX_SECONDS = 2.0
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 1000  # of indentation and of %-formats


class LimitError(jinja2.TemplateError):
    """The template costs too much: not a matter of one row."""


class Budget(threading.local):
    """What a rendering has used; one for each thread, so that threads can share a template."""

    deadline = float("inf")
    total = 0

    def restart(self) -> None:
        self.deadline, self.total = time.monotonic() + MAX_SECONDS, 0

    def spend(self, weight: int = 1) -> None:
        """Counts a value that was made, and looks at the clock."""
        self.total += weight
        if self.total > MAX_TOTAL:
            raise LimitError(f"it makes more than {MAX_TOTAL} characters")
        if time.monotonic() > self.deadline:
            raise LimitError(f"it takes longer than {MAX_SECONDS:g} s")


def weigh(value: Any) -> int:
    """Returns the number of characters and elements in a value; raises LimitError above MAX_WEIGHT."""
    if type(value) is str and len(value) < MAX_WEIGHT:  # nearly always
        return len(value) + 1
    weight, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        weight += len(item) + 1 if isinstance(item, str) else 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise LimitError(f"it makes a number of more than {MAX_BITS} bits")
        if weight + len(waiting) > MAX_WEIGHT:
            raise LimitError(f"it makes a value of more than {MAX_WEIGHT} characters")
    return weight


def check_product(left: Any, right: Any) -> None:
    """Refuses text or list * number, and number * number, whose result would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise LimitError(f"it makes a number of more than {MAX_BITS} bits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and weigh(value) * max(0, times) > MAX_WEIGHT:
            raise LimitError(f"it makes a value of more than {MAX_WEIGHT} characters")


def check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise LimitError(f"it makes a number of more than {MAX_BITS} bits")


def check_format(pattern: Any, *_: Any, **__: Any) -> None:
    """Refuses a %-format or str.format text that asks for a wide field."""
    if isinstance(pattern, str) and re.search(r"\d{4}|%[-+ #0.\d]*\*|:[^{}]*\{", pattern):
        raise LimitError(f"it formats with a width of more than {MAX_WIDTH}, or a computed one")


def check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    if text.count(old) * len(new) + len(text) > MAX_WEIGHT:
        raise LimitError(f"it makes a value of more than {MAX_WEIGHT} characters")


def check_width(_: Any, width: Any = 0, *__: Any, **keywords: Any) -> None:
    for value in (width, *keywords.values()):
        if (isinstance(value, int) and abs(value) > MAX_WIDTH) or (isinstance(value, str) and len(value) > MAX_WIDTH):
            raise LimitError(f"it asks for a width of more than {MAX_WIDTH}")


def joined(parts: Iterable[Any], separator: Any = "") -> list[Any]:
    """Returns the parts as a list, after weighing what joins them."""
    parts = list(parts)
    if weigh(parts) + len(parts) * len(str(separator)) > MAX_WEIGHT:
        raise LimitError(f"it makes a value of more than {MAX_WEIGHT} characters")
    return parts


CHECKED_OPERATORS = {"+": None, "*": check_product, "**": check_power, "%": check_format}
CHECKED_FILTERS = {"format": check_format, "replace": check_replace, "indent": check_width, "round": check_width}
