"""JSON without what Python's reader lets pass: repeated keys, NaN, numbers too large, lone surrogates, NUL."""

import json
import re
from typing import Any

from litpeft.core.errors import quoted

SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\r\n]*")  # of JSON


class StrictDecoder:
    """Reads JSON and notes what Python's reader lets pass as the row's flaw, so that the next row can be read."""

    def __init__(self) -> None:
        self.flaw = ""
        self._scan = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float
        ).raw_decode

    def __call__(self, text: str, start: int) -> tuple[Any, int, str]:
        """Returns the value at `start`, the index after it, and its flaw or ""; raises ValueError if it is not JSON."""
        self.flaw = ""
        try:
            value, end = self._scan(text, start)
            if not self.flaw and text.find("\\u", start, end) >= 0:
                self._characters(value)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return value, end, self.flaw

    def _note(self, flaw: str) -> None:
        self.flaw = self.flaw or flaw

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            self._note(f"the key {quoted(next(key for key in keys if keys.count(key) > 1))} appears twice")
        return result

    def _constant(self, name: str) -> None:
        self._note(f"{name} is not a JSON number")

    def _int(self, digits: str) -> int:
        if len(digits) > 1000:
            self._note(f"a number has {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            self._note(f"the number {digits[:20]} is too large")
        return value

    def _characters(self, value: Any) -> None:
        """Notes what only escapes can spell: a lone surrogate, or NUL."""
        plain = json.dumps(value, ensure_ascii=False)
        if SURROGATE.search(plain):
            self._note("it holds a lone surrogate, which is no character")
        elif "\\u0000" in plain.replace("\\\\", ""):
            self._note("it holds a NUL character")


def skip(text: str, position: int) -> int:
    """Returns where the next value begins."""
    return SPACE.match(text, position).end()
