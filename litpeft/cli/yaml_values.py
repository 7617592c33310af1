"""Refuses numbers and words that YAML 1.1 reads otherwise than a person: `yes`, `0123`, `12:30`."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml

from litpeft.cli.yaml_bounds import TooMuch, compose
from litpeft.core.errors import ConfigError

# numbers of YAML 1.1 that are not plain decimal digits
ODD_NUMBERS = {
    r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?": "in base 60",
    r"[-+]?0[xX][0-9a-fA-F_]+": "in base 16",
    r"[-+]?0[bB][01_]+": "in base 2",
    r"[-+]?0[oO][0-7_]+": "in base 8",
    r"[-+]?0[0-9_]+": "with a leading 0, which stands for base 8",
}

DIGITS = 100  # of a number; Python refuses far longer ones


def check_value(node: yaml.Node, key: str, kind: Any, where: str) -> None:
    """Raises if `node`, the value of an option of type `kind`, has a scalar that YAML reads in a surprising way.

    Numbers must be decimal, text must not be read as a number or boolean, and words like `yes` are allowed only for an
    option that takes nothing but booleans.
    """
    types = plain_types(kind)
    for scalar in scalars(node, set()):
        text, plain, tag = scalar.value, scalar.style is None, scalar.tag.rpartition(":")[2]
        if plain and tag in ("int", "float") and len(text) > DIGITS:
            what = f'"{key}" is a number of {len(text):,} characters'
            raise ConfigError(what, where=where, hint="write it shorter; text needs quotes")
        odd = next((why for pattern, why in ODD_NUMBERS.items() if re.fullmatch(pattern, text)), None)
        hint = f'put it in quotes: "{text}"'
        if types == {str}:
            if plain and tag in ("bool", "float", "int"):
                what = f'"{key}" must be text, and YAML reads {text} as {yaml.safe_load(text)}'
                raise ConfigError(what, where=where, hint=hint)
        elif odd is not None:
            hint = "write it in decimal digits, such as 90, 0.0002 or 2e-4"
            raise ConfigError(f'"{key}" is {text}, a number {odd}', where=where, hint=hint)
        elif plain and tag == "bool" and types != {bool} and text.lower() not in ("true", "false"):
            what = f'"{key}" is {text}, which YAML reads as {yaml.safe_load(text)}'
            raise ConfigError(what, where=where, hint=f"write true or false, or {hint}")


def check_word(text: str, key: str, kind: Any, where: str) -> None:
    """Does the same for a value on the command line, where text needs no quotes; raises if it exceeds the limits."""
    if plain_types(kind) == {str} and not re.search("dict|list|tuple", str(kind)) and not {"&", "*"} <= set(text):
        return  # plain text without aliases
    try:
        node = compose(text)
    except TooMuch as error:
        raise ConfigError(str(error), where=where) from None
    except yaml.YAMLError:
        return  # the check of the option's type reports it
    if node is not None and plain_types(kind) != {str}:
        check_value(node, key, kind, "")


def plain_types(kind: Any) -> set[Any]:
    """Returns the types of the scalars in a value of this type, without None."""
    if get_origin(kind) is Literal:
        return set(map(type, get_args(kind)))
    inner = get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind)
    return set().union(*(plain_types(one) for one in inner)) if inner else {kind} - {type(None), Ellipsis}


def scalars(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """Yields every scalar in a node once, keys included, however often aliases repeat it."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    for part in () if isinstance(node, yaml.ScalarNode) else node.value:
        for child in part if isinstance(part, tuple) else (part,):
            yield from scalars(child, seen)
