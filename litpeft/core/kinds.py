"""The values that a setting allows: of its type in words, checked if it is a `Literal`; and bounds of numbers."""

from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from litpeft.core.errors import quoted

Checkpointing = Literal["none", "cheap", "block", "offload"]  # what a block of the model keeps for its backward pass

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def choices(kind: Any) -> list[Any]:
    """Returns the values of a `Literal`, with None if it may be null; an empty list for any other type."""
    parts = alternatives(kind)
    if any(get_origin(part) is not Literal and part is not NoneType for part in parts):
        return []
    named = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [*named, None] if named and NoneType in parts else named


def in_words(kind: Any) -> str:
    """Returns a type in words: `a whole number or null`, `auto, alpaca or messages`."""
    words: list[str] = []
    for part in alternatives(kind):
        origin, args = get_origin(part), get_args(part)
        if origin is Literal:
            words += map(str, args)
        elif origin is dict:
            words.append("keys and values" if args[1] is Any else f"keys and values, each value {in_words(args[1])}")
        else:
            words.append(f"a list, each item {in_words(args[0])}" if origin is tuple else WORDS[part])
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def check_choices(settings: Any, group: str = "") -> None:
    """Raises a ValueError for a setting that is not one of its type's choices; `group` is the prefix of its key."""
    for field in fields(settings):
        allowed, value = choices(field.type), getattr(settings, field.name)
        if allowed and value not in allowed:
            raise ValueError(f"{group}{field.name} must be {in_words(field.type)}, got {quoted(value)}")


def check_least(settings: Any, group: str = "", most: int | None = None, **least: int) -> None:
    """Raises a ValueError for a number among the settings that is below its `least` value, or above `most`."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int | float) and (value < bound or (most is not None and value > most)):
            limits = f"at least {bound}" + ("" if most is None else f" and at most {most}")
            raise ValueError(f"{group}{name} must be {limits}, got {value}")


def check_share(settings: Any, group: str, name: str) -> None:
    """Raises a ValueError for a share among the settings that is below 0, or not below 1."""
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{group}{name} must be at least 0 and below 1, got {getattr(settings, name)}")
