"""Strict conversion of JSON values to the types of dataclasses, so that a file changed by hand is noticed."""

import math
import types
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from litpeft.core.errors import UserError
from litpeft.core.json import jsonable
from litpeft.core.kinds import WORDS, in_words

LATER = {"later": True}  # metadata of a field that older files do not have: they mean its default


def later(default: Any) -> Any:
    """Returns a field that older files do not have: they mean this default."""
    return field(default=default, metadata=LATER)


def defaults(cls: type) -> dict[str, Any]:
    """Returns the defaults of a dataclass's fields that are marked LATER, by name, as JSON has them."""
    return {field.name: jsonable(field.default) for field in fields(cls) if field.metadata == LATER}


def typed(kind: Any, value: Any, key: str) -> Any:
    """Returns a JSON value as the type `kind`: a scalar, a union, list, tuple or dict of such, or a dataclass.

    A dataclass needs each of its fields but those marked LATER, and no other key, and checks their ranges itself. Only
    lists are converted, to tuples, and whole numbers, to float. Raises a ValueError with the key (below `key`), what is
    allowed and what came.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _any_of(inner, value, key)
    if origin is Literal:
        if type(value) is not str or value not in inner:
            raise _wrong(key, in_words(kind), value)
        return value
    if is_dataclass(origin):
        return _dataclass(origin, value, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(key, "keys and values", value)
        return {name: typed(inner[1], item, f"{key}.{name[:40]}") for name, item in value.items()}
    if origin in (list, tuple):
        endless = origin is list or inner[1:] == (...,)
        if not isinstance(value, list) or not (endless or len(value) == len(inner)):
            raise _wrong(key, "a list" if endless else f"a list of {len(inner)}", value)
        kinds = inner[:1] * len(value) if endless else inner
        return origin(typed(one, item, f"{key}[{at}]") for at, (one, item) in enumerate(zip(kinds, value, strict=True)))
    return _plain(origin, value, key)


def _any_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:  # its own error is more precise
        return typed(kinds[0], value, key)
    for kind in kinds:
        try:
            return typed(kind, value, key)
        except ValueError:
            continue
    raise _wrong(key, " or ".join(map(in_words, kinds)), value)


def _dataclass(cls: type, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, "keys and values", value)
    hints, inside = get_type_hints(cls), f"{key}." if key else ""
    names = [field.name for field in fields(cls)]
    value = defaults(cls) | value
    for name in (*names, *value):
        if name not in value:
            raise ValueError(f"{inside}{name} is missing")
        if name not in names:
            raise ValueError(f"{inside}{name[:40]} is not known; there are {', '.join(names)}")
    given = {name: typed(hints[name], value[name], f"{inside}{name}") for name in names}
    try:
        return cls(**given)
    except (UserError, ValueError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        raise ValueError(f"{key}: {what}" if key else what) from None


def _plain(kind: type, value: Any, key: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(key, "a finite number" if kind is float else WORDS[kind], value)
    if kind is int and abs(value) > 2**63:
        raise _wrong(key, "a whole number of at most 63 bits", value)
    if kind is str and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise _wrong(key, "a text without NUL characters and lone surrogates", value)
    return value


def _wrong(key: str, allowed: str, value: Any) -> ValueError:
    shown = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:60]
    return ValueError(f"{key} must be {allowed}, got {shown}")
